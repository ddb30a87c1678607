"""Rank 0's runner under CCA attention: lays a step out as for one rank, and tells it to all."""

from longctx.engine.core_rows import CoreRows
from longctx.engine.core_runner import CoreRunner
from longctx.engine.scheduler import Chunk
from longctx.shards.core_rank import CoreRank
from longctx.shards.core_rank_step import CoreRankStep
from longctx.shards.runner import GroupRunner
from memory.page_moves import PageMoves
from parallel.gloo_group import GlooGroup


class CoreGroupRunner(GroupRunner):
    """Of ranks that have the same pages all.

    Args:
        rank, group, timeout_s: see the base class.
        rows: the decoding sequences.
    """

    def __init__(self, rank: CoreRank, group: GlooGroup, timeout_s: float, rows: CoreRows) -> None:
        super().__init__(rank, group, timeout_s)
        self._rows = rows
        self._layout = CoreRunner(rank.decoder, rank.pool, rows=rows, device=rank.decoder.device)
        self._moves = rank.pool.moves = PageMoves()

    def _make_step(self, chunks: list[Chunk]) -> tuple[CoreRankStep, bytes]:
        self._rows.locate_tokens()
        exports = tuple(
            chunk.sequence.active.request_id
            for chunk in chunks
            if chunk.is_last and chunk.sequence.active.export is not None
        )
        step = CoreRankStep(self._layout.lay_step(chunks)[1], *self._moves.take(), exports)
        return step, step.write()
