"""What rank 0 tells the other ranks before each step: which tokens of which sequences are computed, and where they lie.

A sequence's pages are told once: the next steps in a row in which it takes part name only what was added.
"""

import json
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Tokens ``start`` to ``stop`` of one sequence."""

    key: int  # names the sequence
    start: int
    stop: int
    samples: bool  # whether the next token is sampled from the last of them
    rope_floor: int  # the shortest length that length-dependent RoPE sees at them
    export: str  # the request whose KV is shipped, or empty
    token_ids: Int64Array = field(repr=False)  # [stop - start]
    pages: Int32Array  # of the whole sequence, as rank 0 numbers them


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One step: segments in the order of rank 0's batch, and what is done before them."""

    segments: tuple[Segment, ...]
    copies: tuple[tuple[int, int], ...] = ()  # of pages
    arrived: tuple[int, ...] = ()  # pages that another worker sent, and whose landmarks all ranks are to know
    saves: tuple[tuple[int, bytes], ...] = ()  # pages that their ranks save, first of all, and their digests
    loads: tuple[tuple[int, bytes], ...] = ()  # pages that their ranks load, last of all; only in an errand

    @property
    def is_errand(self) -> bool:
        """Whether nothing is computed: of a sequence that was told of, the next step may go on."""
        return not self.segments


class StepWriter:
    """Rank 0's side: steps as bytes."""

    def __init__(self) -> None:
        self._told: dict[int, Int32Array] = {}  # pages of the last step's sequences

    def write(self, step: Step) -> bytes:
        """The bytes for ``StepReader.read``, which must read every step in turn."""
        heads, arrays, told = [], [], {}
        for segment in step.segments:
            known = self._told.get(segment.key)
            num_known = 0
            if known is not None and np.array_equal(known, segment.pages[: len(known)]):
                num_known = len(known)
            told[segment.key] = segment.pages.copy()
            arrays += [segment.token_ids.astype("<i8"), segment.pages[num_known:].astype("<i8")]
            flags = [segment.key, segment.start, segment.stop, int(segment.samples), segment.rope_floor]
            heads.append([*flags, num_known, len(segment.pages), segment.export])
        if not step.is_errand:
            self._told = told
        stored = [[(page, digest.hex()) for page, digest in pages] for pages in (step.saves, step.loads)]
        head = json.dumps([heads, step.copies, step.arrived, *stored], separators=(",", ":")).encode()
        head += b" " * (-len(head) % 8)
        return len(head).to_bytes(8, "little") + head + b"".join(array.tobytes() for array in arrays)


class StepReader:
    """The other ranks' side."""

    def __init__(self) -> None:
        self._told: dict[int, Int32Array] = {}

    def read(self, data: bytes) -> Step:
        """The inverse of ``StepWriter.write``."""
        end = 8 + int.from_bytes(data[:8], "little")
        heads, copies, arrived, *stored = json.loads(data[8:end])
        numbers = np.frombuffer(data, dtype="<i8", offset=end)
        segments, told, place = [], {}, 0
        for key, start, stop, samples, rope_floor, num_known, num_pages, export in heads:
            token_ids = numbers[place : place + stop - start]
            place += stop - start
            added = numbers[place : place + num_pages - num_known].astype(np.int32)
            place += num_pages - num_known
            pages = np.concatenate((self._told[key][:num_known], added)) if num_known else added
            told[key] = pages
            segments.append(Segment(key, start, stop, bool(samples), rope_floor, export, token_ids, pages))
        saves, loads = (tuple((page, bytes.fromhex(digest)) for page, digest in pages) for pages in stored)
        pairs = tuple((source, target) for source, target in copies)
        step = Step(tuple(segments), pairs, tuple(arrived), saves, loads)
        if not step.is_errand:
            self._told = told
        return step
