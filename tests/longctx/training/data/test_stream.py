"""Sequences are full, exact and the same on any number of ranks and after any number of resumptions."""

import json
import random
import threading
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from longctx.errors import CheckpointError, ConfigError, DataError
from longctx.training.data.config import DataConfig
from longctx.training.data.documents import IGNORED
from longctx.training.data.packing import PackedSequence
from longctx.training.data.stream import SequenceStream, merge_states, read_eval_sequences
from tests.longctx.training.data.tokenizers_and_rows import demo_tokenizer, trained_texts, write_lines

LENGTH = 48
END = 256
NUM_LANES = 4


def make_rows(seed: int, num_rows: int) -> list[dict]:
    """Rows of every kind; each begins with its number."""
    generator = random.Random(seed)
    rows = []
    for number in range(num_rows):
        words = f"{number}:" + "é" * generator.choice((1, 3, 9, 20, 70))
        kind = generator.choice(("text", "completion", "chat"))
        if kind == "text":
            rows.append({"text": words})
        elif kind == "completion":
            rows.append({"prompt": f"{number}:", "completion": words})
        else:
            rows.append({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": words}]})
    return rows


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "rows.jsonl", make_rows(0, 23))


def open_stream(file: Path, lanes: range = range(NUM_LANES), *, num_lanes: int = NUM_LANES, state=None, **options):
    config = DataConfig(path=str(file), **options)
    return SequenceStream(
        config, demo_tokenizer(), context_length=LENGTH, num_lanes=num_lanes, lanes=lanes, state=state
    )


def read(file: Path, num_batches: int, lanes: range = range(NUM_LANES), **options) -> list[list[PackedSequence]]:
    with open_stream(file, lanes, **options) as stream:
        return [stream.next_batch() for _ in range(num_batches)]


def check_sequence(sequence: PackedSequence) -> None:
    for tensor in (sequence.input_ids, sequence.labels):
        assert tensor.shape == (1, LENGTH) and tensor.dtype == torch.int64
    bounds = sequence.cu_seqlens
    assert bounds[0] == 0 and bounds[-1] == LENGTH and all(low < high for low, high in pairwise(bounds))
    assert len(bounds) - 1 - len(sequence.provenance) in (0, 1)  # 1: padding
    ids, labels = sequence.input_ids[0], sequence.labels[0]
    assert ((labels == ids) | (labels == IGNORED)).all()
    assert all(labels[start] == IGNORED for start in bounds[:-1])
    if len(bounds) - 1 > len(sequence.provenance):
        assert (ids[bounds[-2] :] == END).all() and (labels[bounds[-2] :] == IGNORED).all()
    targets = labels.roll(-1)  # as a loss shifts them that knows the documents
    targets[[stop - 1 for stop in bounds[1:]]] = IGNORED
    assert sequence.num_targets == int((targets != IGNORED).sum()) > 0


def same(one: list[list[PackedSequence]], other: list[list[PackedSequence]]) -> bool:
    return len(one) == len(other) and all(
        len(a) == len(b)
        and all(
            torch.equal(x.input_ids, y.input_ids)
            and torch.equal(x.labels, y.labels)
            and (x.cu_seqlens, x.provenance) == (y.cu_seqlens, y.provenance)
            for x, y in zip(a, b, strict=True)
        )
        for a, b in zip(one, other, strict=True)
    )


def documents(batches: list[list[PackedSequence]]) -> list[tuple[str, list[int], list[int]]]:
    """Place, ids and labels of every document, in order."""
    found = []
    for sequence in (sequence for batch in batches for sequence in batch):
        bounds = sequence.cu_seqlens
        for place, start, stop in zip(sequence.provenance, bounds, bounds[1:], strict=False):
            found.append((place, sequence.input_ids[0, start:stop].tolist(), sequence.labels[0, start:stop].tolist()))
    return found


@pytest.mark.parametrize("long_rows", ["split", "truncate", "skip"])
@pytest.mark.parametrize("packing", [True, False])
def test_lanes_do_not_depend_on_the_number_of_ranks(rows_file: Path, long_rows: str, packing: bool) -> None:
    options = {"long_rows": long_rows, "packing": packing}
    whole = read(rows_file, 20, **options)
    for sequence in (sequence for batch in whole for sequence in batch):
        check_sequence(sequence)
        assert packing or len(sequence.provenance) == 1
    for dp_degree in (2, 4):
        share = NUM_LANES // dp_degree
        parts = [read(rows_file, 20, range(d * share, (d + 1) * share), **options) for d in range(dp_degree)]
        assert same(whole, [[one for part in parts for one in part[step]] for step in range(20)])


@pytest.mark.parametrize("long_rows", ["split", "truncate"])
@pytest.mark.parametrize("seed", range(3))
def test_resuming_at_random_on_another_number_of_ranks(rows_file: Path, seed: int, long_rows: str) -> None:
    generator = random.Random(seed)
    write_lines(rows_file, [*make_rows(0, 23), '{"text": 5}'])
    options = {"long_rows": long_rows, "bad_rows": "skip", "prefetch": generator.choice((1, 9))}
    whole, num_skipped = [], 0
    with open_stream(rows_file, **options) as stream:
        whole = [stream.next_batch() for _ in range(40)]
        num_skipped = stream.num_skipped
    assert num_skipped > 0
    resumed: list[list[PackedSequence]] = []
    state = None
    while len(resumed) < len(whole):
        dp_degree = generator.choice((1, 2, 4))
        num_batches = min(generator.randint(0, 9), len(whole) - len(resumed))
        share = NUM_LANES // dp_degree
        streams = [
            open_stream(rows_file, range(d * share, (d + 1) * share), state=state, **options) for d in range(dp_degree)
        ]
        resumed += [[one for stream in streams for one in stream.next_batch()] for _ in range(num_batches)]
        state = json.loads(json.dumps(merge_states(stream.state() for stream in streams)))
        total = sum(stream.num_skipped for stream in streams)
        for stream in streams:
            stream.close()
    assert same(whole, resumed)
    assert total == num_skipped


def test_an_epoch_has_every_row_once_and_the_next_is_in_another_order(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", [{"text": "x" * 47} for _ in range(12)])
    with open_stream(file, num_lanes=3, lanes=range(3)) as stream:
        places = [one.provenance for _ in range(12) for one in stream.next_batch()]
        assert 1 < stream.epoch < 4 + 64 / 12 * 3
    epochs = [places[start : start + 12] for start in (0, 12, 24)]
    assert all(len(place) == 1 for place in places)
    assert [len(set(epoch)) for epoch in epochs] == [12, 12, 12]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = read(file, 4, range(3), num_lanes=3, seed=1)
    assert [one.provenance for batch in other for one in batch] != epochs[0]
    straight = read(file, 8, range(3), num_lanes=3, shuffle=False)
    assert [one.provenance for batch in straight for one in batch] == [(f"{file}:{n % 12 + 1}",) for n in range(24)]


def test_fewer_rows_than_lanes(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", [{"text": "first"}, {"text": "second"}])
    batches = read(file, 3, range(8), num_lanes=8)
    counts = Counter(place for place, _, _ in documents(batches))
    assert set(counts) == {f"{file}:1", f"{file}:2"}
    for sequence in (sequence for batch in batches for sequence in batch):
        check_sequence(sequence)
        assert sequence.cu_seqlens[len(sequence.provenance)] >= LENGTH - 1  # full, but for a cut that teaches nothing


def test_texts_fill_sequences_and_lose_nothing(tmp_path: Path) -> None:
    texts = [f"<{number}>" + "abcdefghij" * (number % 14) for number in range(30)]
    file = write_lines(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    pieces: dict[str, list[int]] = {}
    sequences = read_eval_sequences(
        DataConfig(eval_path=str(file)), demo_tokenizer(), context_length=LENGTH, num_sequences=1000
    )
    for sequence in sequences[:-1]:
        assert sequence.cu_seqlens[len(sequence.provenance)] >= LENGTH - 1
    for place, ids, labels in documents([sequences]):
        assert labels == [IGNORED, *ids[1:]]
        pieces.setdefault(place, []).extend(ids)
    for number, text in enumerate(texts, 1):
        left = [*text.encode(), END]
        assert pieces[f"{file}:{number}"] in (left, left[:-1])  # a last token alone teaches nothing


def test_a_prompt_stays_with_its_completion(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{number}:" + "q" * (number % 20), "completion": "a" * (1 + number % 9)} for number in range(40)
    ]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    batches = read(file, 12)
    for place, ids, labels in documents(batches):
        row = rows[int(place.rsplit(":")[-1]) - 1]
        assert ids == [*(row["prompt"] + row["completion"]).encode(), END]
        assert trained_texts(demo_tokenizer(), ids, labels) == [row["completion"] + "<|endoftext|>"]
    used = [one.cu_seqlens[len(one.provenance)] for batch in batches for one in batch]
    assert sum(used) / len(used) > 0.95 * LENGTH  # found by best fit


def test_a_long_prompt_is_left_out_where_nothing_is_trained_on(tmp_path: Path) -> None:
    row = {"prompt": "p" * (2 * LENGTH + 5), "completion": "answer"}
    file = write_lines(tmp_path / "rows.jsonl", [row])
    (first,), (second,) = read(file, 2, range(1), num_lanes=1, packing=False)
    for sequence in (first, second):
        assert sequence.cu_seqlens == (0, 12, LENGTH)
        assert sequence.input_ids[0, :12].tolist() == [*b"pppppanswer", END]


@pytest.mark.parametrize("long_rows", ["truncate", "skip", "fail"])
def test_long_rows(tmp_path: Path, long_rows: str) -> None:
    long_text, exact = "L" * LENGTH, "e" * (LENGTH - 1)
    rows = [{"text": exact}, {"text": long_text}, {"prompt": "p" * LENGTH, "completion": "late"}]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    config = DataConfig(eval_path=str(file), long_rows=long_rows)
    if long_rows == "fail":
        with pytest.raises(DataError, match=r"rows\.jsonl:2: the row is too long: 49 tokens, train\.context_length=48"):
            read_eval_sequences(config, demo_tokenizer(), context_length=LENGTH, num_sequences=9)
        return
    sequences = read_eval_sequences(config, demo_tokenizer(), context_length=LENGTH, num_sequences=9)
    assert sequences[0].input_ids[0].tolist() == [*exact.encode(), END]
    assert [one.input_ids[0].tolist() for one in sequences[1:]] == [[*long_text.encode()]] * (long_rows == "truncate")
    with open_stream(file, range(1), num_lanes=1, long_rows=long_rows) as stream:
        for _ in range(4):
            stream.next_batch()
        assert stream.num_skipped > 0


def test_bad_rows_are_fatal_in_their_turn_or_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": "x" * 47}, {"text": "y" * 47}, "{broken", {"text": ""}, {"text": "z" * 47}]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    with open_stream(file, range(1), num_lanes=1, shuffle=False, packing=False) as stream:
        assert [stream.next_batch()[0].provenance for _ in range(2)] == [(f"{file}:1",), (f"{file}:2",)]
        for _ in range(2):
            with pytest.raises(DataError, match=r"rows\.jsonl:3: not JSON"):
                stream.next_batch()
    with open_stream(file, range(1), num_lanes=1, shuffle=False, packing=False, bad_rows="skip") as stream:
        places = [stream.next_batch()[0].provenance[0] for _ in range(4)]
        assert places == [f"{file}:1", f"{file}:2", f"{file}:5", f"{file}:1"]
        assert stream.num_skipped == 2
    assert f"skipped: {file}:3: not JSON" in caplog.text and f"skipped: {file}:4: 'text' is empty" in caplog.text


def test_data_without_a_good_row_ends(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", [{"body": "x"}] * 5)
    with (
        open_stream(file, bad_rows="skip") as stream,
        pytest.raises(DataError, match="no row can be trained on; 41 were skipped, lastly: "),
    ):
        stream.next_batch()
    config = DataConfig(eval_path=str(file), bad_rows="skip")
    with pytest.raises(ConfigError, match="has no row that can be evaluated on"):
        read_eval_sequences(config, demo_tokenizer(), context_length=LENGTH, num_sequences=2)


def test_evaluation_reads_the_first_sequences_in_order(rows_file: Path) -> None:
    config = DataConfig(eval_path=str(rows_file), packing=False, long_rows="truncate", seed=3)
    sequences = read_eval_sequences(config, demo_tokenizer(), context_length=LENGTH, num_sequences=5)
    assert [one.provenance for one in sequences] == [(f"{rows_file}:{number}",) for number in range(1, 6)]
    sequences = read_eval_sequences(config, demo_tokenizer(), context_length=LENGTH, num_sequences=1000)
    assert len(sequences) == 23
    packed = replace(config, packing=True)
    sequences = read_eval_sequences(packed, demo_tokenizer(), context_length=LENGTH, num_sequences=1000)
    assert {place for one in sequences for place in one.provenance} == {f"{rows_file}:{n}" for n in range(1, 24)}


def test_a_state_of_other_data_is_refused(rows_file: Path) -> None:
    with open_stream(rows_file) as stream:
        state = stream.state()
    with pytest.raises(CheckpointError, match=r"num_lanes=4, now it is 8: keep train\.batch_size"):
        open_stream(rows_file, num_lanes=8, state=state)
    with pytest.raises(CheckpointError, match="does not say where lane 1"):
        open_stream(rows_file, state={**state, "lanes": {"0": state["lanes"]["0"]}})
    with pytest.raises(CheckpointError, match="ranks read different data"):
        merge_states([state, {**state, "seed": 5}])
    write_lines(rows_file, make_rows(0, 24))
    with pytest.raises(CheckpointError, match=r"num_rows=23, now it is 24: keep data\.path"):
        open_stream(rows_file, state=state)


def test_closing_ends_the_thread(rows_file: Path) -> None:
    before = threading.active_count()
    stream = open_stream(rows_file, prefetch=1)
    assert threading.active_count() == before + 1
    stream.close()
    stream.close()
    assert threading.active_count() == before
