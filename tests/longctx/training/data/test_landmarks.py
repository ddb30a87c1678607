"""Landmarks stand behind every block of each document, and nothing of the text is lost or trained on twice."""

from itertools import pairwise

import pytest
import torch

from longctx.errors import CheckpointError
from longctx.models.attention_spec import LandmarkSpec
from longctx.training.data.config import DataConfig
from longctx.training.data.documents import IGNORED
from longctx.training.data.packing import count_places, count_room
from longctx.training.data.stream import SequenceStream
from tests.longctx.training.data.tokenizers_and_rows import demo_tokenizer, write_lines

LENGTH, END, LANDMARK = 48, 256, 300  # an END that a cut leaves alone teaches nothing, and is dropped


def open_stream(file, block_size, state=None, **options):
    landmarks = LandmarkSpec(block_size, LANDMARK) if block_size else None
    return SequenceStream(
        DataConfig(path=str(file), **options),
        demo_tokenizer(),
        context_length=LENGTH,
        num_lanes=2,
        lanes=range(2),
        landmarks=landmarks,
        state=state,
    )


@pytest.fixture
def rows(tmp_path):
    kinds = [{"text": "a" * n} for n in (1, 3, 14, 90, 200)] + [{"prompt": "b" * 9, "completion": "c" * 30}]
    return write_lines(tmp_path / "rows.jsonl", kinds)


@pytest.mark.parametrize("block_size", [1, 2, 7, 47])
def test_room_is_the_longest_that_fits(block_size):
    landmarks = LandmarkSpec(block_size, LANDMARK)
    for places in range(200):
        room = count_room(places, landmarks)
        assert count_places(room, landmarks) <= places < count_places(room + 1, landmarks)
        assert count_room(places, None) == count_places(places, None) == places


@pytest.mark.parametrize("long_rows", ["split", "truncate"])
@pytest.mark.parametrize("block_size", [1, 5, 15])
def test_every_block_has_its_landmark(rows, block_size, long_rows):
    with open_stream(rows, block_size, long_rows=long_rows, shuffle=False) as stream:
        sequences = [each for _ in range(6) for each in stream.next_batch()]
    for sequence in sequences:
        ids, labels = sequence.input_ids[0], sequence.labels[0]
        assert len(ids) == LENGTH
        marks = torch.zeros(LENGTH, dtype=torch.bool)
        for start, stop in pairwise(sequence.cu_seqlens):
            marks[start + block_size : stop : block_size + 1] = True
        assert torch.equal(ids == LANDMARK, marks)
        assert sequence.num_landmarks == int(marks.sum()) and sequence.num_tokens == LENGTH - int(marks.sum())
        assert (labels[marks] == IGNORED).all() and (labels != LANDMARK).all()
        is_counted = labels != IGNORED
        assert torch.equal(labels[is_counted], ids[is_counted])


def test_texts_lose_nothing(rows):
    read = {}
    for block_size in (None, 5):
        with open_stream(rows, block_size, shuffle=False) as stream:
            sequences = [each for _ in range(8) for each in stream.next_batch()]
        read[block_size] = {}
        for sequence in sequences:
            for (start, stop), place in zip(pairwise(sequence.cu_seqlens), sequence.provenance, strict=False):
                ids = sequence.input_ids[0, start:stop]
                read[block_size].setdefault(place, []).extend(ids[ids < END].tolist())
    for place, ids in read[5].items():
        shared = min(len(ids), len(read[None][place]))
        assert ids[:shared] == read[None][place][:shared]


def test_a_stream_goes_on_where_it_stood_with_the_same_blocks_only(rows):
    with open_stream(rows, 5) as stream:
        stream.next_batch()
        state = stream.state()
        expected = [stream.next_batch() for _ in range(3)]
    with open_stream(rows, 5, state) as stream:
        for batch in expected:
            for one, other in zip(batch, stream.next_batch(), strict=True):
                assert torch.equal(one.input_ids, other.input_ids)
    with pytest.raises(CheckpointError, match=r"is of block_size=5, now it is 7: keep attention\.block_size"):
        open_stream(rows, 7, state)
    with open_stream(rows, None) as stream:
        old = {key: value for key, value in stream.state().items() if key != "block_size"}
    open_stream(rows, None, old).close()  # written before there were landmarks
