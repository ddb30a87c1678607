"""Who carries bytes between ranks: a torch.distributed group, or the memory of one process for virtual ranks."""

import datetime
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


class ExchangeError(RuntimeError):
    """An exchange cannot go on: a peer died, stalled, or disagrees about what to exchange."""


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """Bytes to or from a peer."""

    buffer: torch.Tensor  # uint8 [num_bytes]
    peer: int
    tag: int


class Transfer(ABC):
    """One message on its way."""

    peer: int
    verb: str  # "send to" or "receive from"

    @abstractmethod
    def is_done(self) -> bool:
        """Whether ``wait`` would return at once."""

    @abstractmethod
    def wait(self, timeout_s: float) -> None:
        """Until it is done; raises ``RuntimeError`` if the peer is lost or the time is up."""


class Carrier(ABC):
    """Moves messages among the ranks of one group."""

    rank: int
    world_size: int

    @abstractmethod
    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> tuple[list[Transfer], list[Transfer]]:
        """Start messages, all at once; buffers belong to the carrier until their transfer is done."""

    @abstractmethod
    def gather_numbers(self, numbers: Sequence[int], timeout_s: float) -> list[list[int]]:
        """Every rank's integers (the same count everywhere), in rank order."""


class GroupCarrier(Carrier):
    """A torch.distributed group: gloo on a CPU, NCCL on GPUs.

    gloo matches messages by tag and moves them on its own threads. NCCL knows no tags: messages between two ranks match
    by their order, which is the plan's, and each step's are one group call, so that no two ranks wait for each other.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group or dist.group.WORLD
        if self._group is None:
            raise ValueError("torch.distributed is not initialised: call init_process_group, or pass a group")
        self.rank, self.world_size = dist.get_rank(self._group), dist.get_world_size(self._group)
        self._is_nccl = dist.get_backend(self._group) == "nccl"

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> tuple[list[Transfer], list[Transfer]]:
        if self._is_nccl:
            return self._post_together(sends, receives)
        received: list[Transfer] = [
            WorkTransfer(dist.irecv(m.buffer, group=self._group, tag=m.tag, group_src=m.peer), m, "receive from")
            for m in receives
        ]
        sent: list[Transfer] = []
        for m in sends:
            work = dist.isend(m.buffer, group=self._group, tag=m.tag, group_dst=m.peer)
            sent.append(WorkTransfer(work, m, "send to"))
        return sent, received

    def gather_numbers(self, numbers: Sequence[int], timeout_s: float) -> list[list[int]]:
        device = torch.device("cuda", torch.cuda.current_device()) if self._is_nccl else torch.device("cpu")
        own = torch.tensor(numbers, dtype=torch.int64, device=device)
        everyone = [torch.empty_like(own) for _ in range(self.world_size)]
        work = dist.all_gather(everyone, own, group=self._group, async_op=True)
        assert work is not None
        work.wait(datetime.timedelta(seconds=timeout_s))
        return [theirs.tolist() for theirs in everyone]

    def _post_together(
        self, sends: Sequence[Message], receives: Sequence[Message]
    ) -> tuple[list[Transfer], list[Transfer]]:
        operations = [dist.P2POp(dist.isend, m.buffer, group=self._group, group_peer=m.peer) for m in sends]
        operations += [dist.P2POp(dist.irecv, m.buffer, group=self._group, group_peer=m.peer) for m in receives]
        if not operations:
            return [], []
        works = dist.batch_isend_irecv(operations)
        works = works * len(operations) if len(works) == 1 else works  # one for the whole group call
        sent: list[Transfer] = [WorkTransfer(w, m, "send to") for w, m in zip(works, sends, strict=False)]
        received: list[Transfer] = [
            WorkTransfer(w, m, "receive from") for w, m in zip(works[len(sends) :], receives, strict=True)
        ]
        return sent, received


class WorkTransfer(Transfer):
    def __init__(self, work: Any, message: Message, verb: str) -> None:
        self._work, self._message = work, message  # the buffer lives as long as the transfer
        self.peer, self.verb = message.peer, verb

    def is_done(self) -> bool:
        return self._work.is_completed()

    def wait(self, timeout_s: float) -> None:
        self._work.wait(datetime.timedelta(seconds=timeout_s))


class VirtualNetwork:
    """Ranks of one process: messages wait in memory until their receiver looks."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.mail: dict[tuple[int, int, int], list[torch.Tensor]] = {}  # source, destination, tag
        self.bytes_between: dict[tuple[int, int], int] = {}

    def carrier(self, rank: int) -> "VirtualCarrier":
        """One rank's side."""
        return VirtualCarrier(self, rank)


class VirtualCarrier(Carrier):
    """One virtual rank's side of a ``VirtualNetwork``."""

    def __init__(self, network: VirtualNetwork, rank: int) -> None:
        self._network, self.rank, self.world_size = network, rank, network.world_size

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> tuple[list[Transfer], list[Transfer]]:
        for message in sends:
            pair = (self.rank, message.peer)
            self._network.mail.setdefault((*pair, message.tag), []).append(message.buffer)
            sums = self._network.bytes_between
            sums[pair] = sums.get(pair, 0) + message.buffer.numel()
        sent: list[Transfer] = [_DoneTransfer(message.peer) for message in sends]
        return sent, [_VirtualReceive(self._network, self.rank, message) for message in receives]

    def gather_numbers(self, numbers: Sequence[int], timeout_s: float) -> list[list[int]]:
        raise NotImplementedError("virtual ranks share their numbers")


class _DoneTransfer(Transfer):
    verb = "send to"

    def __init__(self, peer: int) -> None:
        self.peer = peer

    def is_done(self) -> bool:
        return True

    def wait(self, timeout_s: float) -> None:
        """Nothing to wait for."""


class _VirtualReceive(Transfer):
    verb = "receive from"

    def __init__(self, network: VirtualNetwork, rank: int, message: Message) -> None:
        self._network, self._message = network, message
        self.peer, self._key = message.peer, (message.peer, rank, message.tag)

    def is_done(self) -> bool:
        return bool(self._network.mail.get(self._key))

    def wait(self, timeout_s: float) -> None:
        if not self.is_done():
            raise RuntimeError("nothing was sent")
        self._message.buffer.copy_(self._network.mail[self._key].pop(0))


def drive(exchange: Generator[Any, None, None], rank: int, timeout_s: float) -> None:
    """Run one rank's exchange to its end. Raises ``ExchangeError`` naming rank, step and peer."""
    for wait in exchange:
        begun = time.monotonic()
        try:
            wait.transfer.wait(timeout_s)
        except RuntimeError as error:
            raise ExchangeError(
                f"rank {rank}, step {wait.step}: could not {wait.transfer.verb} rank {wait.transfer.peer} "
                f"({time.monotonic() - begun:.1f} s waited, timeout {timeout_s:g} s): {str(error).splitlines()[0]}"
            ) from error


def drive_together(exchanges: Sequence[Generator[Any, None, None]]) -> None:
    """Run virtual ranks in turn, each until it has to wait for another."""
    waits: dict[int, Any] = {}
    left = dict(enumerate(exchanges))
    while left:
        moved = False
        for rank, exchange in list(left.items()):
            while rank in left and (rank not in waits or waits[rank].transfer.is_done()):
                moved = True
                if rank in waits:
                    waits.pop(rank).transfer.wait(0)
                try:
                    waits[rank] = next(exchange)
                except StopIteration:
                    del left[rank]
        if not moved:
            raise ExchangeError(f"every virtual rank waits: {sorted(left)}")
