"""Queries that see blocks of other ranks: they travel to where the blocks lie, and what they saw travels back.

    post   how many blocks and rows each rank asks of each
    post   the blocks and the rows;     meanwhile this rank's own rows see its own blocks
    post   what others' rows saw here

A block is seen whole, so that what comes back needs no log-sum-exp.

Legend: S rows of one head, B blocks of one KV head that they see, D head dim.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch

from parallel.carrier import Carrier, Message, bytes_of
from parallel.exchange import Wait, Waiting

COUNTS, BLOCKS, ROWS, SEEN = range(4)  # tags

Part = tuple[int, int, torch.Tensor]  # the other rank, the tag, what is sent or where it arrives


@dataclass(frozen=True, slots=True, eq=False)
class BlockRows:
    """Rows that each see one whole block, those of a block behind each other."""

    blocks_3B: torch.Tensor  # int64: page as rank 0 numbers it, KV head and number of rows of each block
    q_SD: torch.Tensor


class BlockExchange:
    """One rank's part in one layer.

    Args:
        carrier: to the other ranks.
        asked: this rank's rows, by the rank whose blocks they see.
        holders: ranks that this one may ask, without itself.
        askers: ranks that may ask this one.
        see: attends rows to blocks of this rank, float32 ``[S, D]``.
    """

    def __init__(
        self,
        carrier: Carrier,
        asked: Sequence[BlockRows],
        *,
        holders: Sequence[int],
        askers: Sequence[int],
        see: Callable[[BlockRows], torch.Tensor],
    ) -> None:
        self._carrier, self._asked, self._see = carrier, asked, see
        self._holders, self._askers = holders, askers
        self._sent: list[Wait] = []
        self.seen: list[torch.Tensor] = []  # once it has run, float32 [S, D] of each of ``asked``

    def run(self) -> Waiting:
        """All of it, for ``parallel.carrier.drive``."""
        questions = yield from self._exchange_counts()
        asked = {rank: self._asked[rank] for rank in self._holders if len(self._asked[rank].q_SD)}
        arriving = self._post(
            1,
            [part for rank, rows in asked.items() for part in _parts(rank, rows)],
            [part for rank, rows in questions.items() for part in _parts(rank, rows)],
        )
        own = self._asked[self._carrier.rank]
        seen = {rank: rows.q_SD.new_empty(rows.q_SD.shape, dtype=torch.float32) for rank, rows in asked.items()}
        seen[self._carrier.rank] = self._see(own)
        yield from arriving
        answers = [(rank, SEEN, self._see(rows)) for rank, rows in questions.items()]
        yield from self._post(2, answers, [(rank, SEEN, seen[rank]) for rank in asked])
        yield from self._sent
        nothing = own.q_SD.new_empty((0, own.q_SD.shape[1]), dtype=torch.float32)
        self.seen = [seen.get(rank, nothing) for rank in range(self._carrier.world_size)]

    def _exchange_counts(self) -> Generator[Wait, None, dict[int, BlockRows]]:
        """What other ranks ask: room for it, by rank; nothing for those that do not."""
        like = self._asked[self._carrier.rank]
        own = [(rank, COUNTS, _count(self._asked[rank])) for rank in self._holders]
        theirs = [(rank, COUNTS, like.blocks_3B.new_empty(2)) for rank in self._askers]
        yield from self._post(0, own, theirs)
        counts = {rank: numbers.tolist() for rank, _, numbers in theirs}
        return {rank: _make_room(like, *numbers) for rank, numbers in counts.items() if numbers[1]}

    def _post(self, step: int, sends: Sequence[Part], receives: Sequence[Part]) -> list[Wait]:
        """Start messages; the waits for those that arrive."""
        messages = [[Message(bytes_of(tensor), rank, tag) for rank, tag, tensor in part] for part in (sends, receives)]
        sent, received = self._carrier.post(*messages)
        self._sent += [Wait(transfer, step) for transfer in sent]
        return [Wait(transfer, step) for transfer in received]


def _make_room(like: BlockRows, num_blocks: int, num_rows: int) -> BlockRows:
    return BlockRows(like.blocks_3B.new_empty((3, num_blocks)), like.q_SD.new_empty((num_rows, like.q_SD.shape[1])))


def _parts(rank: int, rows: BlockRows) -> list[Part]:
    return [(rank, BLOCKS, rows.blocks_3B), (rank, ROWS, rows.q_SD)]


def _count(rows: BlockRows) -> torch.Tensor:
    return rows.blocks_3B.new_tensor([rows.blocks_3B.shape[1], len(rows.q_SD)])
