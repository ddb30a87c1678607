"""Cuts whole sequences into the ranks' parts of a layout, and puts them together again."""

from collections.abc import Sequence

import torch

from parallel.layout import Span, check_cu_seqlens, count_tokens, make_layout


def token_positions(spans: Sequence[Span]) -> torch.Tensor:
    """Global indices of a rank's tokens in local order, int64 ``[seq_local]``."""
    parts = [torch.arange(span.start, span.stop, span.step) for span in spans]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def shard_sequence(
    x: torch.Tensor,
    dim: int,
    *,
    rank: int,
    world_size: int,
    layout: str = "zigzag",
    cu_seqlens: Sequence[int] | torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A rank's part of a whole sequence, and where its tokens stood.

    Args:
        x: any tensor whose ``dim`` is the global sequence.
        dim: the dimension to cut; may be negative.
        rank, world_size: whose part.
        layout: ``contiguous``, ``zigzag``, ``striped`` or ``balanced``.
        cu_seqlens: ``[num_documents + 1]`` boundaries, for ``balanced``.

    Returns:
        The part, contiguous, and its global positions, int64 ``[seq_local]`` on the device of ``x``.

    Raises:
        ValueError: for an unknown layout, a rank outside the group or boundaries that do not fit ``x``.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} is not allowed: 0 to world_size - 1 = {world_size - 1}")
    bounds = check_cu_seqlens(cu_seqlens, x.shape[dim])
    spans = make_layout(layout, x.shape[dim], world_size, cu_seqlens=bounds)[rank]
    positions = token_positions(spans).to(x.device)
    return x.index_select(dim, positions), positions


def unshard_sequence(
    shards: Sequence[torch.Tensor],
    dim: int,
    *,
    layout: str = "zigzag",
    cu_seqlens: Sequence[int] | torch.Tensor | None = None,
) -> torch.Tensor:
    """The whole sequence from all ranks' parts, in rank order: the inverse of ``shard_sequence``.

    Raises:
        ValueError: for an unknown layout or parts that are not those of this layout.
    """
    length = sum(shard.shape[dim] for shard in shards)
    bounds = check_cu_seqlens(cu_seqlens, length)
    spans = make_layout(layout, length, len(shards), cu_seqlens=bounds)
    for rank, (shard, own) in enumerate(zip(shards, spans, strict=True)):
        if shard.shape[dim] != count_tokens(own):
            raise ValueError(
                f"rank {rank}'s part has {shard.shape[dim]} tokens; {layout} over {length} tokens and "
                f"{len(shards)} ranks gives it {count_tokens(own)}"
            )
    joined = torch.cat(list(shards), dim)
    positions = torch.cat([token_positions(own) for own in spans]).to(joined.device)
    return torch.empty_like(joined).index_copy_(dim, positions, joined)
