"""One rank of the sequence parallelism benchmark: runs every cell with every engine, interleaved, and times it.

Started by ``benchmarks/sequence_parallel.py`` in the rank's network namespace:

    python -m benchmarks.attention_rank RANK SPECIFICATION.json
"""

import dataclasses
import datetime
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.attention_peers import PEERS, Call, PeerMissingError
from benchmarks.hidden_communication import HiddenCommunication
from benchmarks.rank_clock import Stopwatch, find_largest
from longctx import sequence_parallel_attention
from parallel.layout import make_layout
from parallel.link_measurement import measure_links
from parallel.links import LinkModel
from parallel.mask import Mask
from parallel.plan import Problem, make_problem
from parallel.planner import make_plan, rank_plans
from parallel.shard import token_positions

TIMEOUT_S = 300.0
MORE_ROUNDS = 5  # times as many at most, for cells that are over soon
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
        self.record["error"] = find_largest(inputs.error(out.detach()))
        self.record["correct"] = self.record["error"] < MAX_ERROR

    def run(self) -> None:
        """Once, timed: the slowest rank's time; bytes are this rank's own."""
        inputs = self._inputs
        watch = Stopwatch()
        out = self._call(inputs.q, inputs.k, inputs.v)
        self._note("forward", watch)
        watch = Stopwatch()
        out.backward(inputs.dout)
        self._note("backward", watch)

    @property
    def seconds(self) -> float:
        """Of all rounds so far, the same on all ranks."""
        return sum(self.record["forward_s"]) + sum(self.record["backward_s"])

    def _note(self, direction: str, watch: Stopwatch) -> None:
        lap = watch.stop()
        self.record[f"{direction}_s"].append(lap.seconds)
        self.record[f"{direction}_bytes"].append(lap.sent_bytes)


def make_inputs(cell: Cell) -> Inputs:
    """This rank's, for longctx's plans."""
    rank, problem = dist.get_rank(), cell.make_problem(dist.get_world_size())
    rows, columns = (token_positions(spans[rank]) for spans in (problem.q_layout, problem.kv_layout))
    return Inputs(cell, rows - (cell.num_tokens - cell.num_q), columns)


def make_engines(
    cell: Cell, names: Sequence[str], links: LinkModel, own: Inputs
) -> tuple[list[Engine], dict[str, str]]:
    """Those of ``names`` that can do the cell, and why the others cannot."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
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


def measure_cell(cell: Cell, specification: dict[str, Any], links: LinkModel) -> dict[str, Any]:
    """All engines, taking turns, each round in another order."""
    own = make_inputs(cell)
    engines, skipped = make_engines(cell, specification["engines"], links, own)
    for engine in engines:
        engine.check()
    problem = cell.make_problem(dist.get_world_size())
    hidden = {
        name: HiddenCommunication(
            make_plan(name, problem, links, backward=True), (own.q, own.k, own.v, own.dout), TIMEOUT_S
        )
        for name in specification["hidden"]
    }
    num_rounds = 0
    while num_rounds < specification["rounds"] or (
        num_rounds < MORE_ROUNDS * specification["rounds"]
        and sum(engine.seconds for engine in engines) < specification["least_s"]
    ):
        for engine in random.Random(num_rounds).sample(engines, len(engines)):
            engine.run()
        if num_rounds < specification["rounds"]:
            for each in hidden.values():
                each.run()
        num_rounds += 1
    _describe_plans(engines, problem, links)
    return {
        "cell": dataclasses.asdict(cell),
        "skipped": skipped,
        "engines": {engine.name: engine.record for engine in engines},
        "hidden": {name: each.record for name, each in hidden.items()},
    }


def _describe_plans(engines: Sequence[Engine], problem: Problem, links: LinkModel) -> None:
    """Note what each plan promises."""
    candidates = {each.plan.name: each for each in rank_plans(problem, links, backward=True)}
    for engine in engines:
        name = make_plan("auto", problem, links, backward=True).name if engine.name == "auto" else engine.name
        if name not in candidates:
            continue
        candidate = candidates[name]
        for direction, backward in (("forward", False), ("backward", True)):
            between = candidate.plan.bytes_between(backward=backward)
            engine.record[f"planned_{direction}_bytes"] = sum(
                num_bytes for (source, _), num_bytes in between.items() if source == dist.get_rank()
            )
        assert candidate.backward is not None
        engine.record |= {
            "plan": name,
            "predicted_forward_s": candidate.forward.seconds,
            "predicted_backward_s": candidate.backward.seconds,
            "predicted_compute_s": candidate.forward.compute_s,
        }


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
    results = [measure_cell(cell, specification, measured.links) for cell in cells]
    content = {"links": dataclasses.asdict(measured.links), "all_at_once": measured.all_at_once, "cells": results}
    (path.parent / f"rank-{rank}.json").write_text(json.dumps(content))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
