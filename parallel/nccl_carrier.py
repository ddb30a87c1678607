"""Carries bytes between GPUs: an NCCL group, whose messages wait for the device's streams and not for the process.

    compute   | step 0 | step 1 | step 2 ...       a step waits for the messages that it reads, posted in earlier steps
    messages  |  of 0  |  of 1  |  of 2  ...       a step's start when what was computed before them has ended

NCCL knows no tags: messages between two ranks match by their order, which is the plan's on both ends, and a step's are
one group call, so that no two ranks wait for each other. A group call ends as a whole.

The process runs ahead of the device and waits once, at the end of a call (``confirm``): NCCL raises nothing by itself
when a peer is lost. When the time is up the group is aborted, which is what lets the streams go on. torch's own
watchdog ends the process when it sees an aborted or failed group, unless TORCH_NCCL_ASYNC_ERROR_HANDLING=0 was set
before the group was made. With TORCH_NCCL_BLOCKING_WAIT=1 the process waits at every step; results are the same.

Buffers need no ``record_stream``: they are made and freed in the order of the compute stream, messages start after
what was computed before they were posted, and whoever frees a buffer has made the compute stream wait for its
message. With it, a process that runs ahead would find no freed buffer usable, and hold those of all steps.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from parallel.carrier import Carrier, Message, Transfer

POLL_S = 5e-5


class NcclCarrier(Carrier):
    """One rank's GPU in an NCCL group.

    Args:
        group: made with the ``nccl`` backend.
        device: of the tensors; for others than a GPU's, the current GPU, so that the ranks can agree about the mistake.
    """

    device_type = "cuda"

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group = group
        self._device = device if device.type == "cuda" else torch.device("cuda", torch.cuda.current_device())
        self._stream = torch.cuda.Stream(self._device)
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> tuple[list[Transfer], list[Transfer]]:
        operations = [dist.P2POp(dist.isend, m.buffer, group=self._group, group_peer=m.peer) for m in sends]
        operations += [dist.P2POp(dist.irecv, m.buffer, group=self._group, group_peer=m.peer) for m in receives]
        if not operations:
            return [], []
        ready = torch.cuda.current_stream(self._device).record_event()
        self._stream.wait_event(ready)
        with torch.cuda.stream(self._stream):
            for work in dist.batch_isend_irecv(operations):
                work.wait()  # this stream waits for NCCL's own, the process does not
            done = self._stream.record_event()
        call = GroupCall(ready, done, [m.peer for m in (*sends, *receives)], self._check, self._abort)
        sent: list[Transfer] = [_NcclTransfer(call, self._device, m, "send to") for m in sends]
        return sent, [_NcclTransfer(call, self._device, m, "receive from") for m in receives]

    def gather_numbers(self, numbers: Sequence[int], timeout_s: float) -> list[list[int]]:
        with torch.cuda.stream(self._stream):
            own = torch.tensor(numbers, dtype=torch.int64, device=self._device)
            everyone = own.new_empty((self.world_size, len(numbers)))
            ready = self._stream.record_event()
            work = dist.all_gather(list(everyone), own, group=self._group, async_op=True)
            assert work is not None
            work.wait()
            done = self._stream.record_event()
            others = [rank for rank in range(self.world_size) if rank != self.rank]
            GroupCall(ready, done, others, self._check, self._abort).confirm(timeout_s)
            return everyone.tolist()

    def abandon(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _check(self) -> None:
        """Raise ``RuntimeError`` if the group has failed: then its calls end, with anything in their buffers."""
        find_error = getattr(self._backend(), "get_error", None)  # torch binds it for NCCL only
        error = None if find_error is None else find_error()
        if error is not None and error.name != "SUCCESS":
            raise RuntimeError(f"the NCCL group has failed: {error.name}")

    def _abort(self) -> None:
        self._backend().abort()

    def _backend(self) -> Any:
        return self._group._get_backend(self._device)


class GroupCall:
    """One group call of NCCL: it ends as a whole.

    Args:
        ready: event after which it may start.
        done: event after which it has ended.
        peers: whom it exchanges with.
        check: raises ``RuntimeError`` if the group has failed.
        abort: ends it by force.
    """

    def __init__(
        self, ready: Any, done: Any, peers: Sequence[int], check: Callable[[], None], abort: Callable[[], None]
    ) -> None:
        self._ready, self.done, self._check, self._abort = ready, done, check, abort
        self._peers = sorted(set(peers))
        self.is_awaited = False  # whether the compute stream waits for it

    def confirm(self, timeout_s: float) -> None:
        """Until it has ended; ``timeout_s`` after it might have started, abort the group and raise ``RuntimeError``."""
        self._ready.synchronize()  # how long this rank computed before is not the peers' fault
        deadline = time.monotonic() + timeout_s
        while not self.done.query():
            if time.monotonic() > deadline:
                self._abort()
                named = ", ".join(map(str, self._peers))
                raise RuntimeError(f"the NCCL call with {named} has not ended; which of them is late NCCL does not say")
            time.sleep(POLL_S)
        self._check()


class _NcclTransfer(Transfer):
    is_asynchronous = True

    def __init__(self, call: GroupCall, device: torch.device, message: Message, verb: str) -> None:
        self._call, self._device = call, device
        self._message: Message | None = message  # the buffer lives until the compute stream waits for it
        self.peer, self.verb = message.peer, verb

    def is_done(self) -> bool:
        return self._call.is_awaited or self._call.done.query()

    def wait(self, timeout_s: float) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._call.done)
        self._call.is_awaited, self._message = True, None

    def confirm(self, timeout_s: float) -> None:
        self._call.confirm(timeout_s)
