"""Who carries bytes between ranks: a torch.distributed group, or the memory of one process for virtual ranks."""

import datetime
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from parallel.registry import Registry

CARRIERS = Registry(
    "carrier",
    {
        "gloo": "parallel.carrier:GroupCarrier",
        "nccl": "parallel.nccl_carrier:NcclCarrier",
    },
)

NUMBERS_TAG = 1 << 21  # exchange plans count their tags from 0


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
    is_asynchronous = False  # whether ``wait`` makes the device wait and not the process

    @abstractmethod
    def is_done(self) -> bool:
        """Whether the buffer may be used without a ``wait``."""

    @abstractmethod
    def wait(self, timeout_s: float) -> None:
        """Until the buffer may be used; raises ``RuntimeError`` if the peer is lost or the time is up."""

    def confirm(self, timeout_s: float) -> None:  # noqa: B027 - nothing to do for most
        """After ``wait``, for an asynchronous one: until the process knows that it is done, or ``RuntimeError``."""


class Carrier(ABC):
    """Moves messages among the ranks of one group."""

    rank: int
    world_size: int
    device_type: str  # of the tensors it carries

    @abstractmethod
    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> tuple[list[Transfer], list[Transfer]]:
        """Start messages, all at once; buffers belong to the carrier until their transfer is done."""

    def gather_numbers(self, numbers: Sequence[int], timeout_s: float) -> list[list[int]]:
        """Every rank's integers (the same count everywhere), in rank order. Each rank sends to each, so that the one
        that is missing is known: ``ExchangeError`` names it.
        """
        own = torch.tensor(numbers, dtype=torch.int64)
        everyone = [own if rank == self.rank else torch.empty_like(own) for rank in range(self.world_size)]
        peers = [rank for rank in range(self.world_size) if rank != self.rank]
        sent, received = self.post(
            [Message(own.view(torch.uint8), peer, NUMBERS_TAG) for peer in peers],
            [Message(everyone[peer].view(torch.uint8), peer, NUMBERS_TAG) for peer in peers],
        )
        finish([*received, *sent], self.rank, timeout_s)
        return [theirs.tolist() for theirs in everyone]

    def abandon(self) -> None:  # noqa: B027 - nothing to do for most
        """An exchange ended early: its buffers will be freed while messages may still be under way."""


class GroupCarrier(Carrier):
    """A torch.distributed group on CPUs, gloo: it matches messages by tag and moves them on its own threads."""

    device_type = "cpu"

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> tuple[list[Transfer], list[Transfer]]:
        received = [start(self._receive, m, "receive from", self.rank) for m in receives]
        return [start(self._send, m, "send to", self.rank) for m in sends], received

    def _receive(self, message: Message) -> Any:
        return dist.irecv(message.buffer, group=self._group, tag=message.tag, group_src=message.peer)

    def _send(self, message: Message) -> Any:
        return dist.isend(message.buffer, group=self._group, tag=message.tag, group_dst=message.peer)


def start(method: Callable[[Message], Any], message: Message, verb: str, rank: int) -> Transfer:
    """Begin a transfer on ``rank``; ``ExchangeError`` names a peer that is known to be gone."""
    try:
        return WorkTransfer(method(message), message, verb)
    except RuntimeError as error:
        raise ExchangeError(
            f"rank {rank} could not {verb} rank {message.peer}: {str(error).splitlines()[0]}"
        ) from error


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor as a message's buffer, uint8 ``[num_bytes]``; no copy."""
    assert tensor.is_contiguous()
    return tensor.view(-1).view(torch.uint8)


def finish(transfers: Sequence[Transfer], rank: int, timeout_s: float) -> None:
    """Wait for all on ``rank``, ``timeout_s`` together; ``ExchangeError`` names the peer that is lost or late."""
    deadline = time.monotonic() + timeout_s
    for transfer in transfers:
        try:
            transfer.wait(max(deadline - time.monotonic(), 0.001))
        except RuntimeError as error:
            raise ExchangeError(
                f"rank {rank} could not {transfer.verb} rank {transfer.peer} within {timeout_s:g} s: "
                f"{str(error).splitlines()[0]}"
            ) from error


def open_carrier(group: dist.ProcessGroup | None, device: torch.device) -> Carrier:
    """The carrier of ``group`` (None: the default group) for tensors on ``device``.

    Its ``device_type`` may be another: a group that cannot carry these tensors still carries the numbers that say so.
    """
    found = group or dist.group.WORLD
    if found is None:
        raise ValueError("torch.distributed is not initialised: call init_process_group, or pass a group")
    backends = dict(part.split(":") for part in dist.get_backend_config(found).split(","))
    if backends.get("cuda") == "nccl" and (device.type == "cuda" or "cpu" not in backends):
        return CARRIERS.get("nccl")(found, device)
    return CARRIERS.get("gloo")(found)


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
    """One virtual rank's side of a ``VirtualNetwork``; it carries tensors of any device."""

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
    unconfirmed = []
    for wait in exchange:
        with _name_errors(wait, rank, timeout_s):
            wait.transfer.wait(timeout_s)
        if wait.transfer.is_asynchronous:
            unconfirmed.append(wait)
    for wait in sorted(unconfirmed, key=lambda wait: wait.step):  # later steps depend on earlier ones
        with _name_errors(wait, rank, timeout_s):
            wait.transfer.confirm(timeout_s)


@contextmanager
def _name_errors(wait: Any, rank: int, timeout_s: float) -> Iterator[None]:
    begun = time.monotonic()
    try:
        yield
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
