"""A gloo group of its own: made and closed by one object, without torch.distributed's global state.

So one process may hold ranks of several groups, and a group can be made anew after one of its ranks was lost. Besides
carrying an exchange's messages, rank 0 tells all others something (``tell``, ``listen``).
"""

import datetime
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from parallel.carrier import Carrier, ExchangeError, Message, Transfer, bytes_of, finish, open_carrier, start

TELL_TAG = 1 << 20  # tags from here on; plans count theirs from 0


def open_meeting(address: str, *, timeout_s: float) -> TCPStore:
    """Where ranks find each other, at rank 0; its ``port`` is the system's choice."""
    return TCPStore(
        address,
        0,
        is_master=True,
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=timeout_s),
    )


class GlooGroup(Carrier):
    """One rank's side of a group.

    Args:
        rank, world_size: which of how many.
        meeting: the store where the ranks meet (rank 0: ``open_meeting``'s), or rank 0's (address, port).
        address: this rank's own.
        timeout_s: longest time to find the others, and for any wait that names none.

    Raises:
        ExchangeError: if the others do not come.
    """

    device_type = "cpu"

    def __init__(
        self, rank: int, world_size: int, *, meeting: Store | tuple[str, int], address: str, timeout_s: float
    ) -> None:
        self.rank, self.world_size, self._timeout_s = rank, world_size, timeout_s
        self._has_nccl = False
        timeout = datetime.timedelta(seconds=timeout_s)
        try:
            if isinstance(meeting, tuple):
                host, port = meeting
                meeting = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
            gloo: Any = dist.ProcessGroupGloo  # torch's stubs leave out its methods
            options = gloo._Options()
            options._devices, options._timeout = [gloo.create_device(hostname=address)], timeout
            self._store = meeting  # lives as long as the group
            self._group: Any = gloo(meeting, rank, world_size, options)
        except RuntimeError as error:
            raise ExchangeError(
                f"rank {rank} of {world_size} at {address} did not find the others: {str(error).splitlines()[0]}"
            ) from error

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> tuple[list[Transfer], list[Transfer]]:
        if self._group is None:
            raise ExchangeError(f"rank {self.rank} has left its group")
        received = [start(self._receive, m, "receive from", self.rank) for m in receives]
        return [start(self._send, m, "send to", self.rank) for m in sends], received

    def tell(self, data: bytes) -> None:
        """Rank 0: send ``data`` to every other rank. Raises ``ExchangeError`` if one is lost."""
        parts = [torch.tensor([len(data)], dtype=torch.int64).view(torch.uint8)]
        if data:  # torch makes no tensor of an empty buffer
            parts.append(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        others = range(1, self.world_size)
        sends = [Message(part, peer, TELL_TAG + index) for peer in others for index, part in enumerate(parts)]
        finish(self.post(sends, [])[0], self.rank, self._timeout_s)

    def listen(self, timeout_s: float) -> bytes:
        """Another rank: what rank 0 tells next. Raises ``ExchangeError`` if it is lost or silent for ``timeout_s``."""
        head = torch.empty(8, dtype=torch.uint8)
        finish(self.post([], [Message(head, 0, TELL_TAG)])[1], self.rank, timeout_s)
        body = torch.empty(int(head.view(torch.int64)), dtype=torch.uint8)
        if not len(body):
            return b""
        finish(self.post([], [Message(body, 0, TELL_TAG + 1)])[1], self.rank, timeout_s)
        return body.numpy().tobytes()

    def gather_rows(self, own: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
        """Rank 0 gets every rank's rows, ``[counts[rank], ...]`` of one dtype, in rank order; the others an empty list.

        Raises ``ExchangeError`` if a rank is lost.
        """
        tag = TELL_TAG + 2
        if self.rank:
            if len(own):
                finish(self.post([Message(bytes_of(own), 0, tag)], [])[0], self.rank, self._timeout_s)
            return []
        parts = [own, *(own.new_empty((count, *own.shape[1:])) for count in counts[1:])]
        waiting = [Message(bytes_of(part), rank, tag) for rank, part in enumerate(parts) if rank and len(part)]
        finish(self.post([], waiting)[1], self.rank, self._timeout_s)
        return parts

    def on_device(self, device: torch.device) -> Carrier:
        """What carries tensors on ``device`` among the same ranks: this group, or for GPUs an NCCL group beside it.

        NCCL's is the process's default group: a process that holds GPU ranks holds one. Not run on a GPU yet.
        """
        if device.type == "cpu":
            return self
        dist.init_process_group(
            "nccl",
            store=dist.PrefixStore("nccl", self._store),  # pyright: ignore[reportPrivateImportUsage]
            rank=self.rank,
            world_size=self.world_size,
            timeout=datetime.timedelta(seconds=self._timeout_s),
        )
        self._has_nccl = True
        return open_carrier(None, device)

    def close(self) -> None:
        """Leave the group; peers that wait for this rank are told by their connections."""
        if self._has_nccl:
            self._has_nccl = False
            dist.destroy_process_group()
        self._group = None  # gloo closes the connections with the object

    def _receive(self, message: Message) -> Any:
        return self._group.recv([message.buffer], message.peer, message.tag)

    def _send(self, message: Message) -> Any:
        return self._group.send([message.buffer], message.peer, message.tag)
