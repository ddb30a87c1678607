"""Public sequence parallel attention that runs on a CPU, as shipped, behind the call that the benchmark times.

Where they come from and how they are installed: ``benchmarks/README.md``. Each gets what suits it best: queries and
keys in the layout that balances its work, KV heads not repeated before they travel where it allows that.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from benchmarks.attention_rank import Cell

Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class PeerMissingError(RuntimeError):
    """A peer is not installed, or cannot do a cell; says which."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One peer for one cell."""

    call: Call  # of this rank's q, k and v, ``[batch, seq, heads, head_dim]``
    layout: str  # of the rows that it is given


def make_ring_attention_pytorch(cell: "Cell") -> Peer:
    """lucidrains' Ring Attention; striped where causal, which balances its work.

    Its query head h reads KV head h modulo their number: heads are put in that order on the way in, and back.
    """
    _check(cell)
    ring = _import("ring_attention_pytorch.ring_flash_attention")
    causal = cell.mask == "causal"
    bucket_size, num_kv_heads = cell.num_tokens // dist.get_world_size(), cell.num_kv_heads

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q = q.unflatten(2, (num_kv_heads, -1)).transpose(2, 3).flatten(2, 3)
        out = ring.ring_flash_attn(
            q, k, v, causal=causal, bucket_size=bucket_size, ring_reduce_col=True, striped_ring_attn=causal
        )
        return out.unflatten(2, (-1, num_kv_heads)).transpose(2, 3).flatten(2, 3)

    return Peer(call, "striped" if causal else "contiguous")


def make_deepspeed_ulysses(cell: "Cell") -> Peer:
    """DeepSpeed's DistributedAttention around torch's flash kernel."""
    _check(cell)
    if cell.num_kv_heads % dist.get_world_size():
        raise PeerMissingError(f"{cell.num_kv_heads} KV heads do not divide by the ranks")
    layer = _import("deepspeed.sequence.layer")
    comm = _import("deepspeed.comm")
    if not comm.is_initialized():
        comm.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    causal = cell.mask == "causal"

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        return out.transpose(1, 2)

    module = layer.DistributedAttention(attend, dist.group.WORLD, scatter_idx=2, gather_idx=1)
    return Peer(lambda q, k, v: module(q, k, v, 0), "contiguous")


def make_torch_ring(cell: "Cell") -> Peer:
    """torch's private templated ring attention with its CPU flash operator; zigzag where causal."""
    _check(cell)
    ring = _import("torch.distributed.tensor.experimental._context_parallel._attention")
    causal = cell.mask == "causal"
    ring._cp_options.enable_load_balance = causal
    group_size = cell.num_heads // cell.num_kv_heads

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return _TorchRing.apply(q, k, v, ring, causal, group_size).transpose(1, 2)  # type: ignore[union-attr]

    return Peer(call, "zigzag" if causal else "contiguous")


class _TorchRing(torch.autograd.Function):
    """The operator has no grouped heads: KV heads are repeated where it is called, not before they travel."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ring: Any, causal: bool, group_size: int
    ) -> torch.Tensor:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool = False) -> Any:
            return FLASH(q, _repeat(k, group_size), _repeat(v, group_size), is_causal=is_causal)

        out, lse, *_ = ring._templated_ring_attention(dist.group.WORLD, 2, attend, q, k, v, is_causal=causal)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.choices = ring, causal, group_size
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        ring, causal, group_size = ctx.choices

        def differentiate(**given: Any) -> Any:
            keys, values = (_repeat(given[name], group_size) for name in ("key", "value"))
            dq, dk, dv = FLASH_BACKWARD(
                given["grad_out"],
                given["query"],
                keys,
                values,
                given["out"],
                given["logsumexp"],
                0.0,
                given["is_causal"],
            )
            return dq, _add_up(dk, group_size), _add_up(dv, group_size)

        dq, dk, dv, *_ = ring._templated_ring_attention_backward(
            dist.group.WORLD, 2, differentiate, grad_outputs[0].contiguous(), "grad_out", q, k, v, out, lse, causal
        )
        return dq, dk, dv, None, None, None


PEERS: dict[str, Callable[["Cell"], Peer]] = {
    "ring-attention-pytorch": make_ring_attention_pytorch,
    "deepspeed-ulysses": make_deepspeed_ulysses,
    "torch-ring": make_torch_ring,
}


def _check(cell: "Cell") -> None:
    if cell.mask == "packed":
        raise PeerMissingError("packed documents are not supported")
    if cell.num_q != cell.num_tokens:
        raise PeerMissingError("fewer queries than keys are not supported")


def _import(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise PeerMissingError(f"{name} cannot be imported: {error}") from None


def _repeat(x: torch.Tensor, group_size: int) -> torch.Tensor:
    return x.repeat_interleave(group_size, 1) if group_size > 1 else x


def _add_up(x: torch.Tensor, group_size: int) -> torch.Tensor:
    return x.unflatten(1, (-1, group_size)).sum(2) if group_size > 1 else x
