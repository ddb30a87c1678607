"""A transformers decoder over sequences that the ranks of a group share: same loss and gradients as on one rank.

Everything but attention works on each token alone, so each rank runs the model on its tokens, at their positions in
their document; attention goes through ``sequence_parallel_attention``, plugged in by transformers' attention
interface. Each rank's loss is its tokens' share of the mean over all ranks' tokens: its backward gives a part of the
gradients, and the parts add up.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from longctx.training.attention import Method
from longctx.training.document_rope import DocumentRope
from longctx.training.tiled_loss import IGNORED
from parallel.attention import TIMEOUT_S, sequence_parallel_attention
from parallel.layout import LAYOUTS, check_cu_seqlens
from parallel.links import LinkModel
from parallel.shard import shard_sequence

DENSE = Method(sequence_parallel_attention)
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class SequenceShard:
    """A rank's part of one sequence of packed documents."""

    input_ids: torch.Tensor  # [1, num_local_tokens]
    position_ids: torch.Tensor  # of each token in its document
    targets: torch.Tensor  # the token behind each, IGNORED where it does not count
    document_lengths: torch.Tensor  # of each token's document
    cu_seqlens: tuple[int, ...]  # of the whole sequence
    is_landmark: torch.Tensor | None = None  # bool [num_tokens], of the whole sequence, on the CPU


class SequenceParallel:
    """One model and the ranks that share its sequences.

    Args:
        model: a causal language model whose attention goes through transformers' interface; equal on all ranks. Its
            attention implementation is replaced.
        group: the ranks; None is the default group.
        layout: who holds which tokens.
        plan, links, timeout_s: see ``sequence_parallel_attention``.
        method: attention in training.
        landmark_token_id: of the tokens that are landmarks, which ``method`` may need; None: there are none.

    Raises:
        ValueError: for an unknown layout, or a model with attention dropout.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        group: dist.ProcessGroup | None = None,
        layout: str = "balanced",
        plan: str = "auto",
        links: LinkModel | None = None,
        timeout_s: float = TIMEOUT_S,
        method: Method = DENSE,
        landmark_token_id: int | None = None,
    ) -> None:
        if layout not in LAYOUTS:
            raise ValueError(f"layout {layout!r} is unknown; allowed: {', '.join(LAYOUTS)}")
        if getattr(model.config, "attention_dropout", 0.0):
            raise ValueError(f"attention_dropout={model.config.attention_dropout} is not allowed: 0")
        if method.sees_landmarks != (landmark_token_id is not None):
            raise ValueError(f"landmark_token_id={landmark_token_id} does not go with this attention")
        self.model, self._group, self._layout, self._method = model, group, layout, method
        self._landmark_token_id = landmark_token_id
        self._choices = {"plan": plan, "links": links, "timeout_s": timeout_s, "group": group, "layout": layout}
        self._shard: SequenceShard | None = None  # that is being run, also while it is recomputed
        self._rope = DocumentRope(model, is_deferred=method.rotates)
        self.trace: Path | None = None  # see sequence_parallel_attention; of calls from when it is set
        name = f"longctx_sequence_parallel_{next(_numbers)}"
        AttentionInterface.register(name, self._attend)
        AttentionMaskInterface.register(name, _make_no_mask)
        model.set_attn_implementation(name)

    def loss(
        self, input_ids: torch.Tensor, *, labels: torch.Tensor | None = None, cu_seqlens: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Next-token cross entropy of one sequence of packed documents. Collective.

        Args:
            input_ids: ``[1, num_tokens]``, the whole sequence on every rank.
            labels: the same shape, ``IGNORED`` where a token does not count; None: every token of a document but its
                first counts. Not shifted: a token is predicted from those before it. Landmarks never count, and
                predict nothing.
            cu_seqlens: ``[num_documents + 1]`` boundaries; None: one document.

        Returns:
            The mean over all tokens that count, without a gradient and equal on all ranks; and this rank's share of
            it, to call ``backward`` on. Then ``reduce_gradients``.

        Raises:
            ValueError: if no token counts, or for shapes that do not go together.
        """
        shard = self.shard(input_ids, labels=labels, cu_seqlens=cu_seqlens)
        count = (shard.targets != IGNORED).sum()
        dist.all_reduce(count, group=self._group)
        if not count:
            raise ValueError("no token counts: every label is ignored or begins a document")
        share = self.sum_loss(shard, self._sum_cross_entropy) / count
        mean = share.detach().clone()
        dist.all_reduce(mean, group=self._group)
        return mean, share

    def shard(
        self, input_ids: torch.Tensor, *, labels: torch.Tensor | None = None, cu_seqlens: Sequence[int] | None = None
    ) -> SequenceShard:
        """This rank's part of a sequence. Arguments and errors as for ``loss``."""
        if input_ids.ndim != 2 or input_ids.shape[0] != 1:
            raise ValueError(f"input_ids of shape {tuple(input_ids.shape)} are not allowed: [1, num_tokens]")
        labels = input_ids if labels is None else labels
        if labels.shape != input_ids.shape:
            raise ValueError(f"labels of shape {tuple(labels.shape)} are not allowed: {tuple(input_ids.shape)}")
        num_tokens = input_ids.shape[1]
        bounds = tuple(check_cu_seqlens(cu_seqlens, num_tokens) or (0, num_tokens))
        starts = torch.tensor(bounds[:-1], device=input_ids.device)
        lengths = torch.tensor(bounds, device=input_ids.device).diff()
        positions = torch.arange(num_tokens, device=input_ids.device) - starts.repeat_interleave(lengths)
        is_landmark = None if self._landmark_token_id is None else input_ids[0] == self._landmark_token_id
        return SequenceShard(
            self._cut(input_ids, bounds),
            self._cut(positions[None], bounds),
            self._cut(shift_labels(labels, bounds, is_landmark), bounds),
            self._cut(lengths.repeat_interleave(lengths)[None], bounds),
            bounds,
            None if is_landmark is None else is_landmark.cpu(),
        )

    def sum_loss(self, shard: SequenceShard, forward: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Summed cross entropy of this rank's targets; its backward, too, is to run before the next call. Collective.

        Args:
            shard: of a sequence.
            forward: of ``input_ids``, ``position_ids`` and ``targets``; runs the model and sums the losses.
        """
        self._shard = shard
        self._rope.set_lengths(shard.document_lengths)
        return forward(input_ids=shard.input_ids, position_ids=shard.position_ids, targets=shard.targets)

    def reduce_gradients(self) -> None:
        """Add up the ranks' gradients; afterwards every rank has those of the whole sequence. Collective."""
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad, group=self._group)

    def _sum_cross_entropy(
        self, *, input_ids: torch.Tensor, position_ids: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        logits = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits[0].float(), targets[0], ignore_index=IGNORED, reduction="sum")

    def _cut(self, whole: torch.Tensor, bounds: tuple[int, ...]) -> torch.Tensor:
        rank, world_size = dist.get_rank(self._group), dist.get_world_size(self._group)
        return shard_sequence(whole, 1, rank=rank, world_size=world_size, layout=self._layout, cu_seqlens=bounds)[0]

    def _attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """transformers' attention function: ``[B, heads, S, D]`` in, ``[B, S, heads, D]`` out."""
        if softcap is not None or getattr(module, "sinks", None) is not None:
            raise ValueError("attention with soft caps or sinks is not supported over a shared sequence")
        method = self._method if module.training or self._method.evaluates else DENSE
        shard, more = self._shard, {}
        assert shard is not None, "a model that ranks share runs by SequenceParallel"
        if method.rotates:
            more["rotate"] = self._rope.rotate
        if method.sees_landmarks:
            more["is_landmark"] = shard.is_landmark
        out = method.attend(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            causal=getattr(module, "is_causal", True),
            cu_seqlens=shard.cu_seqlens,
            window=sliding_window,
            scale=scaling,
            trace=self.trace,
            **self._choices,
            **more,
        )
        return out, None


def shift_labels(labels: torch.Tensor, bounds: Sequence[int], is_landmark: torch.Tensor | None = None) -> torch.Tensor:
    """What each token is to predict: the label behind it; ``IGNORED`` at the end of a document.

    Args:
        labels: ``[1, num_tokens]``.
        bounds: ``[num_documents + 1]``.
        is_landmark: bool ``[num_tokens]``: these predict nothing, and the token before one predicts what is behind it.
    """
    if is_landmark is not None:
        is_text = ~is_landmark
        counts = torch.cat([is_text.new_zeros(1, dtype=torch.int64), is_text.cumsum(0)])
        targets = torch.full_like(labels, IGNORED)
        if is_text.any():
            targets[:, is_text] = shift_labels(labels[:, is_text], counts[list(bounds)].tolist())
        return targets
    targets = labels.roll(-1, 1)
    ends = torch.tensor([stop for start, stop in itertools.pairwise(bounds) if start < stop], device=labels.device)
    targets[:, ends - 1] = IGNORED
    return targets


def _make_no_mask(*_: Any, **__: Any) -> None:
    """The exchange plan has the mask."""
