"""Exact attention over a sequence that the ranks of a group share: the one call that training and serving make.

The mask and the layout become tiles, an exchange plan (``parallel/plan.py``) says where each is computed and what
travels for it, and one executor runs the plan, forward and backward. What a plan or a layout cannot do raises before
anything is sent.

Legend: B batch, S this rank's queries, L this rank's keys, H query heads, K KV heads, D head dim.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.carrier import Carrier, ExchangeError, drive, open_carrier
from parallel.exchange import Held, Key
from parallel.kept_attention import current_kept_attention
from parallel.layout import LAYOUTS, list_cu_seqlens
from parallel.links import LinkModel
from parallel.mask import Mask
from parallel.plan import Plan, Problem, make_problem
from parallel.planner import make_plan
from parallel.plans import PLANS
from parallel.tile_attention import TileKernel, choose_kernel
from parallel.tile_exchange import Backward, Forward
from parallel.trace import Trace

TIMEOUT_S = 120.0
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def sequence_parallel_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    group: dist.ProcessGroup | None,
    plan: str = "auto",
    causal: bool = True,
    cu_seqlens: torch.Tensor | Sequence[int] | None = None,
    window: int | None = None,
    window_group: int = 1,
    layout: str = "zigzag",
    layout_cu_seqlens: torch.Tensor | Sequence[int] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    num_nodes: int = 1,
    links: LinkModel | None = None,
    timeout_s: float = TIMEOUT_S,
    trace: str | Path | None = None,
) -> Any:
    """Softmax attention of this rank's queries to every rank's keys, differentiable in q, k and v. Collective.

    Args:
        q: ``[batch, seq_local, num_heads, head_dim]``, this rank's queries in the order of ``layout``. On a CPU any
            floating dtype over gloo; on a GPU float16 or bfloat16 over NCCL, head_dim a multiple of 8 up to 256.
        k, v: ``[batch, kv_local, num_kv_heads, head_dim]``. More keys than queries over all ranks are a cached prefix:
            each rank's keys are then its part of the prefix in ``layout``, followed by those of its queries.
        group: the ranks; None is the default group.
        plan: an exchange plan's name, or ``auto``.
        causal: whether query i sees only keys j <= i.
        cu_seqlens: int32 ``[num_documents + 1]`` over the global sequence of keys, batch 1: nothing is seen across
            documents.
        window: query i sees only keys j with 0 <= i - j < window.
        window_group: the window reaches back to a multiple of this, from the document's beginning on; see ``Mask``.
        layout: who holds what: ``contiguous``, ``zigzag`` (rank r holds chunks r and 2W-1-r), ``striped`` or
            ``balanced`` (for packed documents).
        layout_cu_seqlens: boundaries that ``balanced`` was cut by; None: ``cu_seqlens``.
        scale: of the scores; None is 1 / sqrt(head_dim).
        return_lse: also return the log-sum-exp, float32 ``[batch, num_heads, seq_local]``. Its gradient counts on rows
            where the output has one: what merging partial attention needs.
        num_nodes: nodes that the ranks are spread over in order, for ``hybrid`` and ``ulysses_ring``.
        links: what ``auto`` weighs plans by, the same on every rank; None: ``LinkModel()``, a fast switch.
        timeout_s: seconds to wait for a peer.
        trace: folder that gets a ``rank-R.json`` of what was computed and carried when, forward and backward, for
            Chrome's or Perfetto's viewer; CPU tensors only.

    Returns:
        ``[batch, seq_local, num_heads, head_dim]`` in q's dtype; with ``return_lse`` a pair.

    Raises:
        ValueError: for arguments that do not go together, on every rank and before any query or key is sent.
        ExchangeError: if a peer is lost or stalls; it names rank, step and peer. Make a new group, then call again.
    """
    kept = current_kept_attention()
    if kept is not None and kept.replays:
        out, lse = _Attention.apply(q, k, v, *kept.take())
        return (out, lse.transpose(1, 2)) if return_lse else out
    if not 0 < timeout_s < math.inf:
        raise ValueError(f"timeout_s={timeout_s} is not allowed: seconds, above 0")
    bounds, layout_bounds = _to_bounds(cu_seqlens), _to_bounds(layout_cu_seqlens)
    links = LinkModel() if links is None else links
    chosen_window = window, window_group
    choices = _Choices(
        plan, causal, bounds, *chosen_window, layout, layout_bounds, scale, num_nodes, links, kept is None
    )
    if trace is not None and q.device.type != "cpu":
        raise ValueError(f"trace with tensors on {q.device.type} is not allowed: it shows what a CPU does")
    folder = None if trace is None else Path(trace)
    carrier = open_carrier(group, q.device)
    problem = choices.make_problem(q, _agree(carrier, choices, (q, k, v), folder, timeout_s))
    exchange_plan = make_plan(plan, problem, links, backward=torch.is_grad_enabled(), may_keep=choices.may_keep)
    kernel = choices.choose_kernel(q)
    run = _Run(exchange_plan, carrier, kernel, scale or q.shape[-1] ** -0.5, timeout_s, folder)
    out, lse = _Attention.apply(q, k, v, run, None)
    if kept is not None:
        kept.keep(run, out, lse)
    return (out, lse.transpose(1, 2)) if return_lse else out


def token_ring_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **arguments: Any) -> Any:
    """``sequence_parallel_attention`` with ``plan="token_ring"``."""
    return sequence_parallel_attention(q, k, v, plan="token_ring", **arguments)


def _to_bounds(cu_seqlens: Any) -> Any:
    """Integers, so that every rank's are written alike; what is none is left for ``_Choices.check`` to refuse."""
    try:
        return list_cu_seqlens(cu_seqlens)
    except ValueError:
        return cu_seqlens


@dataclass(frozen=True, slots=True)
class _Choices:
    """What every rank must pass alike."""

    plan: str
    causal: bool
    cu_seqlens: tuple[int, ...] | None
    window: int | None
    window_group: int
    layout: str
    layout_cu_seqlens: tuple[int, ...] | None
    scale: float | None
    num_nodes: int
    links: LinkModel
    may_keep: bool  # what arrives, for the backward

    def check(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Raise ``ValueError`` for what makes no sense on this rank alone."""
        shapes = f"q, k, v of shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)} are not allowed"
        if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
            raise ValueError(f"{shapes}: [batch, seq, heads, head_dim], k and v alike")
        if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or not k.shape[2] or q.shape[2] % k.shape[2]:
            raise ValueError(f"{shapes}: batch and head_dim are equal, num_heads is a multiple of num_kv_heads")
        if not q.shape[3]:
            raise ValueError(f"{shapes}: head_dim is at least 1")
        if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
            raise ValueError(
                f"dtypes {q.dtype}, {k.dtype}, {v.dtype} are not allowed: one floating dtype for all three"
            )
        if k.device != q.device or v.device != q.device:
            raise ValueError(f"q, k, v on {q.device}, {k.device}, {v.device} are not allowed: one device for all three")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout {self.layout!r} is unknown; allowed: {', '.join(LAYOUTS)}")
        if self.plan != "auto" and self.plan not in PLANS:
            raise ValueError(f"plan {self.plan!r} is unknown; allowed: auto, {', '.join(PLANS)}")
        if self.cu_seqlens is not None and q.shape[0] != 1:
            raise ValueError(f"cu_seqlens with batch {q.shape[0]} is not allowed: packed documents need batch 1")
        if self.scale is not None and not (isinstance(self.scale, Real) and 0 < self.scale < math.inf):
            raise ValueError(f"scale={self.scale} is not allowed: a number above 0, or None")
        if not isinstance(self.links, LinkModel):
            raise ValueError(
                f"links={self.links!r} is not allowed: a LinkModel; parallel.links.load_links reads a file"
            )
        list_cu_seqlens(self.cu_seqlens)
        list_cu_seqlens(self.layout_cu_seqlens)
        Mask(self.causal, self.window, None, self.window_group)
        self.choose_kernel(q)

    def choose_kernel(self, q: torch.Tensor) -> TileKernel:
        """For q's device, dtype and head size."""
        return choose_kernel(q.device, q.dtype, q.shape[3], has_stairs=self.window_group > 1)

    def digest(self, q: torch.Tensor, k: torch.Tensor) -> int:
        """A number that is equal where the choices and the shapes that must be equal are."""
        text = repr((self, str(q.dtype), q.shape[0], q.shape[2], k.shape[2], q.shape[3]))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")

    def make_problem(self, q: torch.Tensor, lengths: Sequence[tuple[int, int, int]]) -> Problem:
        """From every rank's numbers of queries and keys. Raises ``ValueError`` if they are not the layout's."""
        num_q, num_kv = sum(own[0] for own in lengths), sum(own[1] for own in lengths)
        problem = make_problem(
            Mask(self.causal, self.window, self.cu_seqlens, self.window_group),
            num_q,
            num_kv,
            (q.shape[2], lengths[0][2], q.shape[3]),
            world_size=len(lengths),
            layout=self.layout,
            batch_size=q.shape[0],
            element_size=q.element_size(),
            num_nodes=self.num_nodes,
            layout_cu_seqlens=self.layout_cu_seqlens,
        )
        for name, index, wanted in (("queries", 0, problem.num_q), ("keys", 1, problem.num_kv)):
            given = tuple(own[index] for own in lengths)
            if wanted != given:
                raise ValueError(
                    f"the ranks hold {list(given)} {name}; {self.layout} over {sum(given)} tokens and {len(given)} "
                    f"ranks gives them {list(wanted)}: cut sequences with shard_sequence"
                )
        return problem


def _make_folder(folder: Path) -> None:
    """For a trace; ``ValueError`` if it cannot be one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"trace={folder} is not allowed, a folder to write to: {error.strerror}") from None


def _agree(
    carrier: Carrier,
    choices: _Choices,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    trace: Path | None,
    timeout_s: float,
) -> list[tuple[int, int, int]]:
    """Every rank's numbers of queries, keys and KV heads, once all have checked their arguments and they are equal."""
    q, k, _ = tensors
    refusal: ValueError | None = None
    numbers = [0, 0, 0, 0, 0]
    try:
        choices.check(*tensors)
        if trace is not None:
            _make_folder(trace)
        if q.device.type != carrier.device_type:
            raise ValueError(f"q on {q.device.type} is not allowed: the group carries tensors on {carrier.device_type}")
        numbers = [1, choices.digest(q, k), q.shape[1], k.shape[1], k.shape[2]]
    except ValueError as error:
        refusal = error
    try:
        everyone = carrier.gather_numbers(numbers, timeout_s)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ExchangeError(f"rank {carrier.rank}, before step 0: {reason}") from error
    if refusal is not None:
        raise refusal
    for rank, (is_good, digest, *_lengths) in enumerate(everyone):
        if not is_good:
            raise ValueError(f"rank {rank} refused its arguments; its own error says why")
        if digest != numbers[1]:
            raise ValueError(
                f"rank {rank} was called with other arguments than rank {carrier.rank}: plan, causal, cu_seqlens, "
                "window, window_group, layout, layout_cu_seqlens, scale, num_nodes, links, dtype, batch, heads and "
                "head_dim must be equal, and whether results are kept for a recomputation"
            )
    return [(num_q, num_kv, num_kv_heads) for _, _, num_q, num_kv, num_kv_heads in everyone]


@dataclass(frozen=True, slots=True)
class _Run:
    plan: Plan
    carrier: Carrier
    kernel: TileKernel
    scale: float
    timeout_s: float
    trace: Path | None

    @contextmanager
    def watch(self, name: str) -> Iterator[tuple[Carrier, TileKernel]]:
        """Carrier and kernel for one direction; with a trace, what they do is written when it has ended well."""
        trace = None if self.trace is None else Trace(self.trace, self.plan, self.carrier.rank, name, self.timeout_s)
        try:
            if trace is None:
                yield self.carrier, self.kernel
            else:
                yield trace.watch_carrier(self.carrier), trace.watch_kernel(self.kernel)
        except BaseException:
            self.carrier.abandon()
            raise
        if trace is not None:
            trace.save()


class _Attention(torch.autograd.Function):
    """Everything that the backward needs is saved as autograd saves it, so that checkpointing can drop it."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        run: _Run,
        past: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kept: dict[Key, Held] = {}
        if past is None:
            rank = run.carrier.rank
            with run.watch("forward") as (carrier, kernel):
                has_backward = any(ctx.needs_input_grad)
                forward = Forward(run.plan, rank, carrier, kernel, q, k, v, run.scale, has_backward=has_backward)
                drive(forward.run(), rank, run.timeout_s)
            out, lse, kept = forward.out.to(q.dtype, copy=True), forward.lse, forward.kept
            if run.plan.may_keep:
                saved_out = forward.out
            else:  # out of the buffer that lse shares with the unrounded output, which is not to live on
                saved_out, lse = out, lse.clone()
        else:
            out, lse = past
            saved_out = out
        ctx.run, ctx.kept_rows = run, [(key, held.rows, len(held.tensors)) for key, held in kept.items()]
        ctx.save_for_backward(q, k, v, saved_out, lse, *(tensor for held in kept.values() for tensor in held.tensors))
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        run, rank = ctx.run, ctx.run.carrier.rank
        q, k, v, out, lse, *arrived = ctx.saved_tensors
        tensors = iter(arrived)
        kept = {key: Held(rows, tuple(islice(tensors, count))) for key, rows, count in ctx.kept_rows}
        dout, dlse = grad_outputs
        if dout is None:
            raise ValueError("a gradient of the log-sum-exp without one of the output is not supported")
        dout = dout.contiguous()
        # dS = P * (dP - delta + dlse), since the log-sum-exp's gradient by a score is that score's P.
        delta = (dout.to(lse.dtype) * out).sum(-1)
        if dlse is not None:
            delta -= dlse
        with run.watch("backward") as (carrier, kernel):
            backward = Backward(run.plan, rank, carrier, kernel, q, k, v, dout, lse, delta, run.scale, kept)
            drive(backward.run(), rank, run.timeout_s)
        return backward.dq.to(q.dtype), backward.dk.to(k.dtype), backward.dv.to(v.dtype), None, None
