"""What one rank did and when, as a trace that Chrome and Perfetto show: tiles computed, messages under way.

``Trace`` stands between the executor and its carrier and kernel. A thread waits for each message, so that its end is
seen when it comes and not when the executor asks for it.
"""

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from parallel.carrier import Carrier, Message, Transfer
from parallel.mask import Tile
from parallel.plan import Move, Plan
from parallel.tile_attention import Block, TileKernel


class Trace:
    """One direction of one call on one rank.

    Args:
        folder: made if it is not there; ``rank-R.json`` in it grows by every call. Times are the machine's clock.
        plan: that is run.
        rank: this one.
        name: ``forward`` or ``backward``.
        timeout_s: longest time that a message may take.
    """

    def __init__(self, folder: Path, plan: Plan, rank: int, name: str, timeout_s: float) -> None:
        self._path = folder / f"rank-{rank}.json"
        self._rank, self._name = rank, f"{plan.name} {name}"
        self._items = {tag: item for item, tag in plan.tags.items()}
        self._offset_ns = time.time_ns() - time.perf_counter_ns()
        self._events: list[dict[str, Any]] = []
        self.timeout_s = timeout_s
        self._step = -1

    def watch_carrier(self, carrier: Carrier) -> Carrier:
        """A carrier that notes what it carries."""
        return _WatchedCarrier(carrier, self)

    def watch_kernel(self, kernel: TileKernel) -> TileKernel:
        """A kernel that notes what it computes."""
        return _WatchedKernel(kernel, self)

    def save(self) -> None:
        """Append to the file what has ended; a JSON array that nobody closes, which the format allows."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self._path.exists()
        with self._path.open("a", encoding="utf-8") as file:
            if is_new:
                name = {"name": "process_name", "ph": "M", "pid": self._rank, "args": {"name": f"rank {self._rank}"}}
                file.write("[\n" + json.dumps(name) + ",\n")
            file.writelines(json.dumps(event) + ",\n" for event in self._events)

    def begin_step(self) -> None:
        """The executor posts once in each step."""
        self._step += 1

    def add(self, name: str, lane: str, begun_ns: int, **arguments: Any) -> None:
        """Something that began at ``begun_ns`` and ends now; from any thread."""
        self._events.append(
            {
                "name": name,
                "cat": self._name,
                "ph": "X",
                "pid": self._rank,
                "tid": lane,
                "ts": (begun_ns + self._offset_ns) / 1e3,
                "dur": (time.perf_counter_ns() - begun_ns) / 1e3,
                "args": {"step": self._step, "plan": self._name} | arguments,
            }
        )

    def follow(self, transfer: Transfer, message: Message) -> Transfer:
        """A transfer whose end is noted when it comes."""
        item = self._items[message.tag]
        what = item.kind if isinstance(item, Move) else {"q": "partial output or dQ", "kv": "dK, dV"}[item.kind]
        return _FollowedTransfer(self, transfer, message, f"{what} of {item.owner}", self._step)


class _WatchedCarrier(Carrier):
    def __init__(self, carrier: Carrier, trace: Trace) -> None:
        self._carrier, self._trace = carrier, trace
        self.rank, self.world_size, self.device_type = carrier.rank, carrier.world_size, carrier.device_type

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> tuple[list[Transfer], list[Transfer]]:
        self._trace.begin_step()
        sent, received = self._carrier.post(sends, receives)
        return (
            [self._trace.follow(transfer, message) for transfer, message in zip(sent, sends, strict=True)],
            [self._trace.follow(transfer, message) for transfer, message in zip(received, receives, strict=True)],
        )

    def gather_numbers(self, numbers: Sequence[int], timeout_s: float) -> list[list[int]]:
        return self._carrier.gather_numbers(numbers, timeout_s)


class _FollowedTransfer(Transfer):
    """Waited for on a thread of its own from the beginning: a transfer may be waited for once only."""

    def __init__(self, trace: Trace, transfer: Transfer, message: Message, name: str, step: int) -> None:
        self.peer, self.verb = transfer.peer, transfer.verb
        self._end: Future[None] = Future()
        Thread(target=self._follow, args=(trace, transfer, message, name, step), daemon=True).start()

    def is_done(self) -> bool:
        return self._end.done()

    def wait(self, timeout_s: float) -> None:
        try:
            self._end.result(timeout_s)
        except TimeoutError as error:
            raise RuntimeError("timed out") from error

    def _follow(self, trace: Trace, transfer: Transfer, message: Message, name: str, step: int) -> None:
        begun = time.perf_counter_ns()
        try:
            transfer.wait(trace.timeout_s)
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            self._end.set_exception(error)
            return
        trace.add(name, f"{self.verb} {self.peer}", begun, step=step, bytes=message.buffer.numel())
        self._end.set_result(None)


class _WatchedKernel(TileKernel):
    def __init__(self, kernel: TileKernel, trace: Trace) -> None:
        self._kernel, self._trace = kernel, trace

    def blocks(self, tile: Tile) -> Iterator[Block]:
        return self._kernel.blocks(tile)

    def forward(
        self, q_BSHD: torch.Tensor, k_BLKD: torch.Tensor, v_BLKD: torch.Tensor, block: Block, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        begun = time.perf_counter_ns()
        result = self._kernel.forward(q_BSHD, k_BLKD, v_BLKD, block, scale)
        self._note(block, q_BSHD, begun)
        return result

    def backward(
        self,
        dout_BSHD: torch.Tensor,
        q_BSHD: torch.Tensor,
        k_BLKD: torch.Tensor,
        v_BLKD: torch.Tensor,
        lse_BSH: torch.Tensor,
        delta_BSH: torch.Tensor,
        block: Block,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        begun = time.perf_counter_ns()
        result = self._kernel.backward(dout_BSHD, q_BSHD, k_BLKD, v_BLKD, lse_BSH, delta_BSH, block, scale)
        self._note(block, q_BSHD, begun)
        return result

    def _note(self, block: Block, q_BSHD: torch.Tensor, begun: int) -> None:
        shape = f"{block.q_stop - block.q_start} x {block.kv_stop - block.kv_start}"
        self._trace.add(f"attend {shape}", "compute", begun, causal=block.is_causal, heads=q_BSHD.shape[2])
