"""What cutting attention into tiles costs on one device: virtual ranks in turn against one unsharded kernel.

    python -m benchmarks.sequence_parallel_gpu --save sequence-parallel-gpu                   # 1M tokens, 80 GB
    python -m benchmarks.sequence_parallel_gpu --device cpu --tokens 2048 --rounds 1          # whether it runs: minutes

Every tile of every rank is computed on one device; nothing travels, and partial results that a rank owes others are
merged where they are owed. In a round the unsharded kernel and each way to cut take turns, in another order each time.
The first round is not timed: it warms up, on ``--warmup-tokens``, and outputs are compared with the unsharded kernel's.
Forward only.
"""

import argparse
import json
import logging
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import Any

import torch

from benchmarks.machine import describe_run, keep_result
from parallel.links import LinkModel
from parallel.mask import Mask
from parallel.merge import choose_merge, merge_partial_
from parallel.plan import Heads, Plan, Work, make_problem
from parallel.planner import make_plan
from parallel.plans import PLANS
from parallel.shard import token_positions
from parallel.tile_attention import PREFERENCE, Block, TileKernel, accumulator_dtype, choose_kernel, split_heads

logger = logging.getLogger(__name__)

LAYOUTS = {"causal": "zigzag", "packed": "balanced"}
LIMITS = {"causal": 1.05, "packed": 1.10}  # tiles over the unsharded kernel
LONG = 1 << 20  # tokens of which one round of minutes is enough: thousands of kernels
MERGE_LIMIT = 0.02  # of tiles and merging
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

Sums = tuple[torch.Tensor, torch.Tensor]  # output and log-sum-exp of one owner's queries


def main() -> None:
    """Run the cells and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--kernel", default="auto", choices=("auto", *PREFERENCE))
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument(
        "--warmup-tokens", type=int, help="of the round that warms up; as many as --tokens unless given"
    )
    parser.add_argument("--world-sizes", nargs="+", type=int, default=[8, 64])
    parser.add_argument("--masks", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    parser.add_argument("--plans", nargs="+", default=["kv_ring"], choices=list(PLANS))
    parser.add_argument("--documents", type=int, default=32, help="of the packed mask, of random lengths")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=5, help="at least 5 to be saved, or 1 of a million tokens")
    parser.add_argument("--save", help="also write benchmarks/results/NAME.json")
    arguments = parser.parse_args()
    least = 1 if arguments.tokens >= LONG else 5
    if arguments.save and arguments.rounds < least:
        parser.error(f"--rounds={arguments.rounds} is too few for a result that is kept; at least {least}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    device = torch.device(arguments.device)
    kernel = choose_kernel(device, DTYPES[arguments.dtype], arguments.head_dim, arguments.kernel)
    content = {
        **describe_run("sequence_parallel_gpu"),
        "settings": {key: value for key, value in vars(arguments).items() if key != "save"},
        "kernel": type(kernel).__name__,
        "merge": choose_merge(device.type).__name__,
        "cells": [cell for mask in arguments.masks for cell in run_mask(arguments, mask, kernel)],
    }
    print(json.dumps(content, indent=1))
    keep_result(content, arguments.save)


def run_mask(arguments: argparse.Namespace, mask_name: str, kernel: TileKernel) -> list[dict[str, Any]]:
    """Every way to cut, in turns with the unsharded kernel."""
    device, layout = torch.device(arguments.device), LAYOUTS[mask_name]
    clock = Clock(device)
    ways = list(product(arguments.world_sizes, arguments.plans))
    rounds: dict[Any, list[dict[str, float]]] = {way: [] for way in (None, *ways)}
    errors: dict[Any, float] = {}
    for round_idx in range(arguments.rounds + 1):
        if round_idx < 2:
            num_tokens = arguments.tokens if round_idx else arguments.warmup_tokens or arguments.tokens
            bounds = cut_documents(num_tokens, arguments.documents if mask_name == "packed" else 1)
            sequence = draw(arguments, num_tokens)
        for way in random.Random(round_idx).sample(list(rounds), len(rounds)):
            shards = None if way is None else Shards.cut(sequence, bounds, layout, way, kernel, clock)
            sums = None
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            if shards is None:
                start = clock.mark()
                attend_unsharded(kernel, *sequence, bounds)
                record = {"unsharded_s": clock.sum([(start, clock.mark())])}
            else:
                sums = shards.attend()
                record = {"tiles_s": clock.sum(shards.tiles), "merge_s": clock.sum(shards.merges)}
            if device.type == "cuda":
                record["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
            if round_idx:
                rounds[way].append(record)
            elif shards is not None and sums is not None:
                errors[way] = shards.compare(sums, attend_unsharded(kernel, *sequence, bounds))
            del shards, sums
    common = {"mask": mask_name, "num_documents": len(bounds) - 1, "layout": layout}
    cells = [common | describe_way(mask_name, way, rounds[way], rounds[None], errors[way]) for way in ways]
    for cell in cells:
        text = (
            "%(mask)s, W = %(world_size)d, %(plan)s: tiles %(ratio).3f of one kernel, merging %(merge_share).4f of all"
        )
        logger.info(text, cell)
    return cells


def draw(arguments: argparse.Namespace, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random q, k and v, ``[1, num_tokens, heads, head_dim]``."""
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(1, num_tokens, heads, arguments.head_dim, generator=generator, device=device, dtype=dtype)
        for heads in (arguments.heads, arguments.kv_heads, arguments.kv_heads)
    )
    return q, k, v


class Clock:
    """Seconds of device time: CUDA events, or the process' clock."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"

    def mark(self) -> Any:
        """A moment in the order of the device's work."""
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def sum(self, spans: Sequence[tuple[Any, Any]]) -> float:
        """Of all spans, once the device has ended them."""
        if not self._is_cuda:
            return sum(stop - start for start, stop in spans)
        torch.cuda.synchronize()
        return sum(start.elapsed_time(stop) for start, stop in spans) / 1e3


@dataclass(slots=True)
class Shards:
    """The whole sequence cut among the ranks of a plan, and when tiles and merges began and ended."""

    plan: Plan
    kernel: TileKernel
    clock: Clock
    rows: list[torch.Tensor]  # of each rank
    q: list[torch.Tensor]
    k: list[torch.Tensor]
    v: list[torch.Tensor]
    tiles: list[tuple[Any, Any]] = field(default_factory=list)
    merges: list[tuple[Any, Any]] = field(default_factory=list)

    @classmethod
    def cut(
        cls,
        sequence: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        bounds: tuple[int, ...],
        layout: str,
        way: tuple[int, str],
        kernel: TileKernel,
        clock: Clock,
    ) -> "Shards":
        """Copies of the ranks' parts; ``way`` is the number of ranks and the plan's name."""
        q, k, _ = sequence
        problem = make_problem(
            Mask(cu_seqlens=bounds if len(bounds) > 2 else None),
            q.shape[1],
            k.shape[1],
            (q.shape[2], k.shape[2], q.shape[3]),
            world_size=way[0],
            layout=layout,
            element_size=q.element_size(),
        )
        rows = [token_positions(spans).to(q.device) for spans in problem.q_layout]
        parts = ([x.index_select(1, own) for own in rows] for x in sequence)
        return cls(make_plan(way[1], problem, LinkModel()), kernel, clock, rows, *parts)

    def attend(self) -> list[Sums]:
        """Every rank in turn; each owner's results."""
        sums = [_new_sums(q) for q in self.q]
        for rank in range(len(self.q)):
            owed: dict[tuple[int, Heads], Sums] = {}
            for work in self.plan.works_of(rank):
                heads, key = slice(*work.heads), (work.q_owner, work.heads)
                if work.q_owner == rank:
                    out, lse = (x[:, :, heads] for x in sums[rank])
                else:
                    if key not in owed:
                        owed[key] = _new_sums(self.q[work.q_owner][:, :, heads])
                    out, lse = owed[key]
                self._attend_work(work, out, lse)
            for back in self.plan.returns_of(rank, backward=False):
                if back.source == rank:
                    partial = owed.pop((back.owner, back.heads))
                    for rows in (slice(*pair) for pair in back.rows):
                        mine = (x[:, rows, slice(*back.heads)] for x in sums[back.owner])
                        self._merge(*mine, *(x[:, rows] for x in partial))
        return sums

    def compare(self, sums: Sequence[Sums], whole: torch.Tensor) -> float:
        """Relative error of the outputs against the unsharded one, which in half precision has one of its own."""
        squared = 0.0
        for own, (out, _) in zip(self.rows, sums, strict=True):
            squared += (out - whole.index_select(1, own)).square().sum(dtype=torch.float64).item()
        return squared**0.5 / torch.linalg.vector_norm(whole, dtype=torch.float64).item()

    def _attend_work(self, work: Work, out: torch.Tensor, lse: torch.Tensor) -> None:
        q = self.q[work.q_owner][:, :, slice(*work.heads)]
        kv_heads = slice(*self.plan.problem.kv_heads(work.heads))
        k, v = (x[work.kv_owner][:, :, kv_heads] for x in (self.k, self.v))
        for tile, (hs, ks) in product(work.tiles, split_heads(work.heads, self.plan.problem.group_size)):
            for block in self.kernel.blocks(tile):
                rows = slice(tile.q_start + block.q_start, tile.q_start + block.q_stop)
                columns = slice(tile.kv_start + block.kv_start, tile.kv_start + block.kv_stop)
                parts = q[:, rows, hs], k[:, columns, ks], v[:, columns, ks]
                start = self.clock.mark()
                partial = self.kernel.forward(*parts, block, q.shape[-1] ** -0.5)
                self.tiles.append((start, self.clock.mark()))
                self._merge(out[:, rows, hs], lse[:, rows, hs], *partial)

    def _merge(self, *tensors: torch.Tensor) -> None:
        start = self.clock.mark()
        merge_partial_(*tensors)
        self.merges.append((start, self.clock.mark()))


def attend_unsharded(
    kernel: TileKernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: tuple[int, ...]
) -> torch.Tensor:
    """Causal attention over the whole sequence: one call of the kernel, of its variable-length form if packed."""
    name, scale = type(kernel).__name__, q.shape[-1] ** -0.5
    if len(bounds) == 2 or name == "CpuFlash":  # the CPU's kernel has no other form: one call a document
        parts = []
        for start, stop in pairwise(bounds):
            block = Block(0, stop - start, 0, stop - start, is_causal=True)
            parts.append(kernel.forward(*(x[:, start:stop] for x in (q, k, v)), block, scale)[0])
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=q.device)
    longest = max(stop - start for start, stop in pairwise(bounds))
    arguments = q[0], k[0], v[0], cu_seqlens, cu_seqlens, longest, longest
    if name == "FlashAttn":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(*arguments, softmax_scale=scale, causal=True)[None]
    return torch.ops.aten._flash_attention_forward(*arguments, 0.0, True, False, scale=scale)[0][None]


def describe_way(
    mask_name: str,
    way: tuple[int, str],
    cut: Sequence[dict[str, float]],
    unsharded: Sequence[dict[str, float]],
    error: float,
) -> dict[str, Any]:
    """Medians over rounds; ratios are of the same round."""
    ratios = [own["tiles_s"] / whole["unsharded_s"] for own, whole in zip(cut, unsharded, strict=True)]
    shares = [own["merge_s"] / (own["tiles_s"] + own["merge_s"]) for own in cut]
    ratio, share = statistics.median(ratios), statistics.median(shares)
    return {
        "world_size": way[0],
        "plan": way[1],
        "error": error,
        "ratio": ratio,
        "ratio_limit": LIMITS[mask_name],
        "share_of_ratio_limit": ratio / LIMITS[mask_name],
        "merge_share": share,
        "merge_share_limit": MERGE_LIMIT,
        "unsharded_s": statistics.median(whole["unsharded_s"] for whole in unsharded),
        "tiles_s": statistics.median(own["tiles_s"] for own in cut),
        "merge_s": statistics.median(own["merge_s"] for own in cut),
        "peak_memory_bytes": max((own.get("peak_memory_bytes", 0) for own in cut), default=0) or None,
        "unsharded_peak_memory_bytes": max((own.get("peak_memory_bytes", 0) for own in unsharded), default=0) or None,
        "rounds": [own | whole for whole, own in zip(unsharded, cut, strict=True)],
    }


def cut_documents(num_tokens: int, num_documents: int) -> tuple[int, ...]:
    """Boundaries of documents of random lengths, the same each time."""
    cuts = random.Random(0).sample(range(1, num_tokens), num_documents - 1)
    return 0, *sorted(cuts), num_tokens


def _new_sums(q: torch.Tensor) -> Sums:
    dtype = accumulator_dtype(q.dtype)
    out = torch.zeros(q.shape, dtype=dtype, device=q.device)
    return out, torch.full(q.shape[:3], float("-inf"), dtype=dtype, device=q.device)


if __name__ == "__main__":
    main()
