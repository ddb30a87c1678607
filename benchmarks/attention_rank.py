"""One rank of the sequence parallelism benchmark: runs every cell with every engine, interleaved, and times it.

Started by ``benchmarks/sequence_parallel.py`` in the rank's network namespace:

    python -m benchmarks.attention_rank RANK SPECIFICATION.json
"""

import dataclasses
import datetime
import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.attention_peers import PEERS, Call, PeerMissingError
from longctx import sequence_parallel_attention
from parallel.layout import make_layout
from parallel.link_measurement import measure_links
from parallel.links import LinkModel
from parallel.mask import Mask
from parallel.plan import Problem, make_problem
from parallel.planner import make_plan, rank_plans
from parallel.shard import token_positions

TIMEOUT_S = 300.0
MAX_ERROR = 1e-4  # relative, float32: what is farther from the exact result is wrong, not imprecise


@dataclass(frozen=True, slots=True)
class Cell:
    """One attention."""

    mask: str  # full, causal or packed
    num_tokens: int  # keys over all ranks
    num_q: int  # queries over all ranks, the last ones
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def make_mask(self) -> Mask:
        """Packed: documents of unequal lengths."""
        shares = (0, 3, 4, 10, 11, 16, 24, 27, 32)
        bounds = tuple(self.num_tokens * share // 32 for share in shares)
        return Mask(self.mask != "full", None, bounds if self.mask == "packed" else None)

    def make_problem(self, world_size: int) -> Problem:
        """For longctx's plans."""
        heads = (self.num_heads, self.num_kv_heads, self.head_dim)
        mask = self.make_mask()
        return make_problem(mask, self.num_q, self.num_tokens, heads, world_size=world_size, layout=self.layout)

    @property
    def layout(self) -> str:
        """Which longctx shards by."""
        return "balanced" if self.mask == "packed" else "zigzag"


class Inputs:
    """One rank's part of a cell in one layout, and the exact output on its rows."""

    def __init__(self, cell: Cell, rows: torch.Tensor, columns: torch.Tensor) -> None:
        generator = torch.Generator().manual_seed(1)
        sizes = [
            (cell.num_q, cell.num_heads),
            (cell.num_tokens, cell.num_kv_heads),
            (cell.num_tokens, cell.num_kv_heads),
        ]
        whole = [torch.randn(1, length, heads, cell.head_dim, generator=generator) for length, heads in sizes]
        self.q, self.k, self.v = (
            x[:, own].contiguous().requires_grad_() for x, own in zip(whole, (rows, columns, columns), strict=True)
        )
        self.dout = torch.randn(self.q.shape, generator=generator)
        self._exact = _attend_exactly(cell, whole, rows)

    def error(self, out: torch.Tensor) -> float:
        """Relative, against float64."""
        return ((out.double() - self._exact).norm() / self._exact.norm()).item()


def _attend_exactly(cell: Cell, whole: list[torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    mask, keys = cell.make_mask(), torch.arange(cell.num_tokens)
    queries = rows + cell.num_tokens - cell.num_q
    visible = torch.ones(len(rows), cell.num_tokens, dtype=torch.bool)
    if mask.causal:
        visible &= keys <= queries[:, None]
    if mask.cu_seqlens is not None:
        bounds = torch.tensor(mask.cu_seqlens[1:])
        visible &= torch.bucketize(keys, bounds, right=True) == torch.bucketize(queries, bounds, right=True)[:, None]
    q, k, v = (x.double().transpose(1, 2) for x in (whole[0][:, rows], *whole[1:]))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
    return out.transpose(1, 2)


class Engine:
    """One way to do a cell.

    Args:
        name: a plan of longctx, or a peer.
        call: of this rank's q, k and v.
        inputs: in the layout that it wants.
    """

    def __init__(self, name: str, call: Call, inputs: Inputs) -> None:
        self.name, self._call, self._inputs = name, call, inputs
        self.record: dict[str, Any] = {"forward_s": [], "backward_s": [], "forward_bytes": [], "backward_bytes": []}

    def check(self) -> None:
        """Run once, untimed, and note how wrong the output is."""
        inputs = self._inputs
        out = self._call(inputs.q, inputs.k, inputs.v)
        out.backward(inputs.dout)
        self.record["error"] = _largest(inputs.error(out.detach()))
        self.record["correct"] = self.record["error"] < MAX_ERROR

    def run(self) -> None:
        """Once, timed: the slowest rank's time; bytes are this rank's own."""
        inputs = self._inputs
        begun, sent = _begin()
        out = self._call(inputs.q, inputs.k, inputs.v)
        self._note("forward", begun, sent)
        begun, sent = _begin()
        out.backward(inputs.dout)
        self._note("backward", begun, sent)

    def _note(self, direction: str, begun: float, sent: int) -> None:
        seconds = time.perf_counter() - begun
        dist.barrier()
        self.record[f"{direction}_s"].append(_largest(seconds))
        self.record[f"{direction}_bytes"].append(count_sent() - sent)


def make_engines(cell: Cell, names: list[str], links: LinkModel) -> tuple[list[Engine], dict[str, str]]:
    """Those of ``names`` that can do the cell, and why the others cannot."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    problem = cell.make_problem(world_size)
    rows, columns = (token_positions(spans[rank]) for spans in (problem.q_layout, problem.kv_layout))
    own = Inputs(cell, rows - (cell.num_tokens - cell.num_q), columns)
    mask = cell.make_mask()
    engines: list[Engine] = []
    skipped: dict[str, str] = {}
    for name in names:
        if name in PEERS:
            try:
                peer = PEERS[name](cell)
            except PeerMissingError as error:
                skipped[name] = str(error)
                continue
            part = token_positions(make_layout(peer.layout, cell.num_tokens, world_size)[rank])
            engines.append(Engine(name, peer.call, Inputs(cell, part, part)))
            continue

        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: str = name) -> torch.Tensor:
            return sequence_parallel_attention(
                q, k, v, group=None, plan=plan, causal=mask.causal, cu_seqlens=mask.cu_seqlens, layout=cell.layout,
                links=links, timeout_s=TIMEOUT_S,
            )  # fmt: skip

        engines.append(Engine(name, call, own))
    return engines, skipped


def measure_cell(cell: Cell, names: list[str], links: LinkModel, num_rounds: int) -> dict[str, Any]:
    """All engines, taking turns, each round in another order."""
    engines, skipped = make_engines(cell, names, links)
    for engine in engines:
        engine.check()
    for index in range(num_rounds):
        for engine in random.Random(index).sample(engines, len(engines)):
            engine.run()
    problem = cell.make_problem(dist.get_world_size())
    candidates = {each.plan.name: each for each in rank_plans(problem, links, backward=True)}
    for engine in engines:
        name = make_plan("auto", problem, links, backward=True).name if engine.name == "auto" else engine.name
        if name in candidates:
            plan = candidates[name].plan
            rank = dist.get_rank()
            for direction, backward in (("forward", False), ("backward", True)):
                between = plan.bytes_between(backward=backward)
                engine.record[f"planned_{direction}_bytes"] = sum(
                    b for (source, _), b in between.items() if source == rank
                )
            engine.record |= {
                "plan": name,
                "predicted_forward_s": candidates[name].forward.seconds,
                "predicted_backward_s": candidates[name].backward.seconds,  # type: ignore[union-attr]
                "predicted_compute_s": candidates[name].forward.compute_s,
            }
    return {
        "cell": dataclasses.asdict(cell),
        "skipped": skipped,
        "engines": {engine.name: engine.record for engine in engines},
    }


def count_sent() -> int:
    """Bytes that this rank's links have sent, as the kernel counts them."""
    files = Path("/sys/class/net").glob("link*/statistics/tx_bytes")
    return sum(int(file.read_text()) for file in files)


def _begin() -> tuple[float, int]:
    dist.barrier()
    sent = count_sent()
    dist.barrier()
    return time.perf_counter(), sent


def _largest(value: float) -> float:
    number = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


def main() -> None:
    """Run what the specification says; rank R writes ``rank-R.json`` beside it."""
    rank, path = int(sys.argv[1]), Path(sys.argv[2])
    specification = json.loads(path.read_text())
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=TIMEOUT_S)
    store = f"file://{path.parent / 'store'}"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=specification["world_size"], timeout=timeout
    )
    measured = measure_links(None, node="one")
    cells = [Cell(**cell) for cell in specification["cells"]]
    results = [measure_cell(cell, specification["engines"], measured.links, specification["rounds"]) for cell in cells]
    content = {"links": dataclasses.asdict(measured.links), "all_at_once": measured.all_at_once, "cells": results}
    (path.parent / f"rank-{rank}.json").write_text(json.dumps(content))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
