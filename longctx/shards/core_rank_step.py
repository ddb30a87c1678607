"""What rank 0 tells the other ranks before each step under CCA attention: all of the step, and what became of pages."""

import json
from dataclasses import dataclass, fields

import numpy as np

from longctx.attention.core_batch import Kept
from longctx.engine.core_step import CoreStep
from longctx.shards.step import Segment

_OTHERS = ("page_size", "core_stride", "kept_B")
_ARRAYS = tuple(field.name for field in fields(CoreStep) if field.name not in _OTHERS)


@dataclass(frozen=True, slots=True, eq=False)
class CoreRankStep:
    """What rank 0 tells.

    ``exports``: requests whose prompt ends in the step and is shipped. Rank 0 has all of it and ships it alone, but
    every rank tells the receiver that it is done.
    """

    arrays: CoreStep
    copies: tuple[tuple[int, int], ...] = ()  # of pages, near and below, made before; as ``memory/page_moves.py`` says
    arrived: tuple[int, ...] = ()  # pages that rank 0 hands over afterwards, ascending
    exports: tuple[str, ...] = ()

    @property
    def segments(self) -> tuple[Segment, ...]:
        """For ``RankExports``: no pages."""
        nothing = np.zeros(0, dtype=np.int64)
        return tuple(Segment(0, 0, 0, True, 0, name, nothing, nothing.astype(np.int32)) for name in self.exports)

    def write(self) -> bytes:
        """For ``CoreStepReader.read``."""
        step = self.arrays
        arrays = [np.ascontiguousarray(getattr(step, name), dtype="<i8") for name in _ARRAYS]
        passed = [
            np.asarray(kept[:count], dtype="<i8") for kept, count in zip(step.kept_B, step.num_passed_B, strict=False)
        ]
        shapes = [array.shape for array in arrays]
        told = [step.page_size, step.core_stride, shapes, self.copies, self.arrived, self.exports]
        head = json.dumps(told, separators=(",", ":")).encode()
        head += b" " * (-len(head) % 8)
        return len(head).to_bytes(8, "little") + head + b"".join(array.tobytes() for array in (*arrays, *passed))


class CoreStepReader:
    """The other ranks' side."""

    def read(self, data: bytes) -> CoreRankStep:
        """The inverse of ``CoreRankStep.write``, but for places below that no page has gone to yet."""
        end = 8 + int.from_bytes(data[:8], "little")
        page_size, core_stride, shapes, copies, arrived, exports = json.loads(data[8:end])
        numbers, place, arrays = np.frombuffer(data, dtype="<i8", offset=end), 0, []
        for shape in shapes:
            count = int(np.prod(shape))
            arrays.append(numbers[place : place + count].reshape(shape))
            place += count
        kept_B: tuple[Kept, ...] = ()
        if core_stride > 1:
            num_passed_B = arrays[_ARRAYS.index("num_passed_B")]
            kept_B = tuple(np.split(numbers[place:], np.cumsum(num_passed_B)[:-1]))
        step = CoreStep(page_size, *arrays, core_stride=core_stride, kept_B=kept_B)
        pairs = tuple((source, target) for source, target in copies)
        return CoreRankStep(step, pairs, tuple(arrived), tuple(exports))
