"""Documents become sequences of exactly one length, each document attending to itself only.

Documents that wait are packed by best fit: the oldest first, then whichever fills most of the rest. A document that is
trained on as a whole may be cut to fill a sequence, and goes on in the next one as a document of its own; one with a
prompt is only cut if it is longer than a sequence (after "Fewer Truncations Improve Language Modeling", Ding et al.,
2024, section 3, with a short queue instead of the whole data set). What is left over is padding, a document of its own.

For landmark attention a landmark token stands behind every ``block_size`` tokens of a document, counted from its
beginning in this sequence; padding has them too, so that no block is longer. Sequences then hold fewer tokens of text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from longctx.models.attention_spec import LandmarkSpec
from longctx.training.data.documents import IGNORED, Document

MIN_CUT = 2  # tokens: fewer teach nothing


@dataclass(frozen=True, slots=True)
class PackedSequence:
    """Documents that follow each other in one sequence.

    ``input_ids`` and ``labels`` are int64 ``[1, context_length]``. Labels are not shifted; those of padding, of what is
    not trained on and of each document's first token are ``IGNORED``, so that the others are what the tokens before
    them predict (but for landmarks, which predict nothing). ``cu_seqlens`` are the boundaries of documents, padding
    included; ``provenance`` says for each but the padding which row it is from.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    cu_seqlens: tuple[int, ...]
    provenance: tuple[str, ...]
    num_landmarks: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens without landmarks."""
        return self.input_ids.shape[1] - self.num_landmarks

    @property
    def num_targets(self) -> int:
        """Tokens that are trained on."""
        return int((self.labels != IGNORED).sum())


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens ``[start, stop)`` of the document at ``row_number`` of the endless order."""

    row_number: int
    document: Document
    start: int
    stop: int

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start

    @property
    def labels(self) -> np.ndarray:
        return self.document.labels[self.start : self.stop]


def take_piece(waiting: list[Piece], space: int, *, oldest: bool) -> Piece | None:
    """Take at most ``space`` tokens out of ``waiting``; None if nothing there may be put in.

    Args:
        waiting: pieces of documents, oldest first. One that is cut stays there with the rest of its tokens.
        space: tokens that are left in the sequence.
        oldest: take from the oldest one.
    """
    if oldest:
        idx = 0
    else:
        fitting = [idx for idx, piece in enumerate(waiting) if piece.num_tokens <= space]
        cuttable = [idx for idx, piece in enumerate(waiting) if piece.document.divisible] if space >= MIN_CUT else []
        if not fitting and not cuttable:
            return None
        idx = max(fitting, key=lambda idx: waiting[idx].num_tokens) if fitting else cuttable[0]
    piece = waiting.pop(idx)
    if piece.num_tokens <= space:
        return piece
    waiting.insert(idx, replace(piece, start=piece.start + space))
    return replace(piece, stop=piece.start + space)


def count_places(num_tokens: int, landmarks: LandmarkSpec | None) -> int:
    """Places of a sequence that a document of ``num_tokens`` takes with its landmarks."""
    return num_tokens if landmarks is None else num_tokens + num_tokens // landmarks.block_size


def count_room(num_places: int, landmarks: LandmarkSpec | None) -> int:
    """The longest document, in tokens, that ``num_places`` have room for."""
    if landmarks is None:
        return num_places
    num_blocks, rest = divmod(num_places, landmarks.block_size + 1)
    return num_blocks * landmarks.block_size + min(rest, landmarks.block_size - 1)  # a full block ends with a landmark


def pack(
    pieces: Sequence[Piece], context_length: int, *, padding_id: int, landmarks: LandmarkSpec | None = None
) -> PackedSequence:
    """One sequence of ``pieces`` in their order, with ``landmarks`` between their tokens."""
    input_ids = torch.full((1, context_length), padding_id, dtype=torch.int64)
    labels = torch.full((1, context_length), IGNORED, dtype=torch.int64)
    bounds = [0]
    for piece in pieces:
        start, stop = bounds[-1], bounds[-1] + count_places(piece.num_tokens, landmarks)
        places = start + _text_places(piece.num_tokens, landmarks)
        input_ids[0, places] = torch.from_numpy(piece.document.ids[piece.start : piece.stop]).long()
        labels[0, places[1:]] = torch.from_numpy(piece.labels[1:]).long()
        bounds.append(stop)
    if bounds[-1] < context_length:
        bounds.append(context_length)
    num_landmarks = 0
    if landmarks is not None:
        size = landmarks.block_size + 1
        places = [place for start, stop in pairwise(bounds) for place in range(start + size - 1, stop, size)]
        input_ids[0, places] = landmarks.landmark_token_id
        num_landmarks = len(places)
    provenance = tuple(piece.document.place for piece in pieces)
    return PackedSequence(input_ids, labels, tuple(bounds), provenance, num_landmarks)


def _text_places(num_tokens: int, landmarks: LandmarkSpec | None) -> torch.Tensor:
    """Where a document's tokens stand, counted from its beginning."""
    tokens = torch.arange(num_tokens)
    return tokens if landmarks is None else tokens + tokens // landmarks.block_size
