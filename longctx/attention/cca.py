"""Core Context Aware attention: groups of tokens pooled into cores, and the nearest tokens as they are.

Chen et al., 2024 (arXiv 2412.12465). With groups of g tokens and a window of s, query i (from 0) attends, in one
softmax, to the cores of the first n = max(0, (i + 1 - s) // g) groups and to tokens n * g to i as they are: s to
s + g - 1 of them, and none is left out or seen twice. A core is the mean of its group's keys (before RoPE) and values,
weighted by how the query of the group's last token attends to the group. Nothing is learned for it.

Legend: B batch, S tokens, N groups, g tokens of a group, H query heads, K KV heads, G = H / K, D head dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from longctx.attention.arguments import check_tensors, document_bounds
from longctx.models.attention_spec import CORE_POSITIONS, HEAD_POOLING
from parallel.tile_attention import accumulator_dtype

Rope = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""``(x [B, S, heads, D], positions)`` to x rotated; positions broadcast to x's first three dimensions."""


def cca_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    group_size: int,
    window: int,
    scale: float | None = None,
    rope: Rope | None = None,
    core_position: str = "last",
    head_pooling: str = "weights",
    cu_seqlens: Sequence[int] | torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal CCA attention over whole sequences, differentiable in q, k and v.

    Args:
        q: ``[batch, seq, num_heads, head_dim]``, before RoPE.
        k, v: ``[batch, seq, num_kv_heads, head_dim]``, k before RoPE; num_heads is a multiple of num_kv_heads.
        group_size: tokens of a core, at least 1.
        window: tokens that every query sees as they are, itself included, at least 1.
        scale: of the scores; None is ``head_dim ** -0.5``.
        rope: rotates x by positions, which count from 0 in each document; None rotates nothing.
        core_position: where a core is for RoPE: at its group's ``last`` token, in its ``middle``, or at the ``mean`` of
            its tokens' positions, weighted as they are.
        head_pooling: how the query heads of a KV head weigh a group together: by the mean of their ``weights``, or by
            the weights of their mean ``query``.
        cu_seqlens: ``[num_documents + 1]`` boundaries of packed documents, for batch 1: nothing is seen across them,
            and groups begin at them.

    Returns:
        ``[batch, seq, num_heads, head_dim]`` in q's dtype.

    Raises:
        ValueError: for arguments that do not go together.
    """
    check_tensors(q, k, v)
    check_sizes(group_size, window)
    for name, value, allowed in (
        ("core_position", core_position, CORE_POSITIONS),
        ("head_pooling", head_pooling, HEAD_POOLING),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is not allowed: {', '.join(allowed)}")
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    parts = []
    for start, stop in pairwise(document_bounds(cu_seqlens, q)):
        own_q, own_k, own_v = (x[:, start:stop] for x in (q, k, v))
        cores = pool_cores(
            own_q, own_k, own_v, group_size, factor, core_position=core_position, head_pooling=head_pooling
        )
        core_k = cores.k
        if rope is not None:
            positions = torch.arange(stop - start, device=q.device)[:, None]
            own_q, own_k, core_k = rope(own_q, positions), rope(own_k, positions), rope(core_k, cores.positions)
        parts.append(attend_cores(own_q, own_k, own_v, core_k, cores.v, group_size, window, factor))
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def check_sizes(group_size: int, window: int) -> None:
    """Raise ``ValueError`` for what is no group or window."""
    if not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"group_size={group_size} is not allowed: tokens, at least 1")
    if not isinstance(window, int) or window < 1:
        raise ValueError(f"window={window} is not allowed: tokens, at least 1")


@dataclass(frozen=True, slots=True)
class Cores:
    """Of the whole groups of a sequence."""

    k: torch.Tensor  # [B, N, K, D], before RoPE
    v: torch.Tensor
    positions: torch.Tensor  # [N, 1] or [B, N, K], float32 (float64)


def pool_cores(
    q_BSHD: torch.Tensor,
    k_BSKD: torch.Tensor,
    v_BSKD: torch.Tensor,
    group_size: int,
    scale: float,
    *,
    core_position: str,
    head_pooling: str,
) -> Cores:
    """Cores of every whole group of ``group_size`` tokens from the beginning; arguments as for ``cca_attention``."""
    dtype, num_groups = accumulator_dtype(q_BSHD.dtype), q_BSHD.shape[1] // group_size
    num_tokens = num_groups * group_size
    last = slice(group_size - 1, num_tokens, group_size)
    q_BNHD = q_BSHD[:, last].to(dtype)
    k_BNgKD, v_BNgKD = (x[:, :num_tokens].to(dtype).unflatten(1, (num_groups, group_size)) for x in (k_BSKD, v_BSKD))
    weights_BNKg = weigh_groups(q_BNHD, k_BNgKD, scale, head_pooling=head_pooling)
    core_k, core_v = (torch.einsum("bnkg,bngkd->bnkd", weights_BNKg, x).to(k_BSKD.dtype) for x in (k_BNgKD, v_BNgKD))
    first = torch.arange(0, num_tokens, group_size, dtype=dtype, device=q_BSHD.device)[:, None]
    return Cores(core_k, core_v, first + place_cores(weights_BNKg, core_position=core_position))


def weigh_groups(q_BNHD: torch.Tensor, k_BNgKD: torch.Tensor, scale: float, *, head_pooling: str) -> torch.Tensor:
    """How the tokens of each group are weighed, ``[B, N, K, g]``: q is that of a group's last token, before RoPE."""
    q_BNKGD = q_BNHD.unflatten(2, (k_BNgKD.shape[3], -1))
    if head_pooling == "query":
        q_BNKGD = q_BNKGD.mean(3, keepdim=True)
    return (torch.einsum("bnkhd,bngkd->bnkhg", q_BNKGD, k_BNgKD) * scale).softmax(-1).mean(3)


def place_cores(weights_BNKg: torch.Tensor, *, core_position: str) -> torch.Tensor:
    """Where cores are for RoPE, counted from their group's first token: ``[1]`` or ``[B, N, K]``, no gradient."""
    group_size = weights_BNKg.shape[-1]
    offsets = torch.arange(group_size, dtype=weights_BNKg.dtype, device=weights_BNKg.device)
    if core_position == "mean":
        return (weights_BNKg.detach() * offsets).sum(-1)
    return offsets[-1:] if core_position == "last" else offsets[-1:] / 2


def attend_cores(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    core_k: torch.Tensor,
    core_v: torch.Tensor,
    group_size: int,
    window: int,
    scale: float,
) -> torch.Tensor:
    """Attention to cores and window, all rotated already, of one document a row; differentiable in all five tensors.

    Args:
        q, k, v: as for ``cca_attention``.
        core_k, core_v: ``[batch, seq // group_size, num_kv_heads, head_dim]``.
    """
    if not q.numel():
        return torch.empty_like(q)
    if q.device.type == "cuda" and q.dtype != torch.float64:
        from longctx.attention.triton_cca import AttendWithTriton as Attend
    else:
        from longctx.attention.cca_parts import AttendInParts as Attend
    return Attend.apply(q, k, v, core_k, core_v, group_size, window, scale)
