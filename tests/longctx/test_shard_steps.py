"""What rank 0 tells the others, who holds what, and what each ships."""

import random

import numpy as np
import pytest

from longctx.shards.exports import OwnPages, RankExports
from longctx.shards.layout import StepLayout
from longctx.shards.step import Segment, Step, StepReader, StepWriter
from memory.layout import KVLayout
from memory.pages import PagePool

SIZE, PER_RANK = 16, 100


def make_segment(key, start, stop, pages, *, samples=True, export=""):
    token_ids = np.arange(start, stop, dtype=np.int64)
    return Segment(key, start, stop, samples, 0, export, token_ids, np.array(pages, dtype=np.int32))


def same(one, other):
    fields = ("key", "start", "stop", "samples", "rope_floor", "export")
    return all(getattr(one, name) == getattr(other, name) for name in fields) and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in ("token_ids", "pages")
    )


def test_steps_are_read_as_they_were_written():
    """Sequences that grow, change their pages (a preemption), pause and come back."""
    rng = random.Random(5)
    writer, reader = StepWriter(), StepReader()
    pages = {key: [rng.randrange(400) for _ in range(rng.randint(1, 9))] for key in range(6)}
    for _ in range(200):
        for key in pages:
            if rng.random() < 0.2:
                pages[key] = [rng.randrange(400) for _ in range(rng.randint(1, 9))]
            elif rng.random() < 0.3:
                pages[key].append(rng.randrange(400))
        chosen = [key for key in pages if rng.random() < 0.7]
        segments = [
            make_segment(key, 0, rng.randint(1, 16), pages[key], export=rng.choice(["", "x-é"])) for key in chosen
        ]
        copies, arrived = rng.choice([(), ((1, 2), (3, 4))]), rng.choice([(), (5, 6)])
        saves, loads = (rng.choice([(), ((7, bytes(range(16))), (8, bytes(16)))]) for _ in range(2))
        step = Step(tuple(segments), copies, arrived, saves, loads)
        read = reader.read(writer.write(step))
        assert (read.copies, read.arrived, read.saves, read.loads) == (copies, arrived, saves, loads)
        assert len(read.segments) == len(step.segments)
        assert all(map(same, read.segments, step.segments))


def test_pages_that_are_known_are_not_told_again():
    writer = StepWriter()
    long = list(range(4000))
    first = writer.write(Step((make_segment(1, 0, 1, long),)))
    writer.write(Step((), loads=((3, bytes(16)),)))  # an errand between them
    second = writer.write(Step((make_segment(1, 1, 2, [*long, 7]),)))
    assert len(first) > 8 * 4000 > 100 * len(second)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_token_and_key_has_one_owner(world_size):
    rng = random.Random(world_size)
    segments = []
    for key in range(5):
        stop = rng.randint(1, 150)
        start = rng.choice([stop - 1, rng.randrange(stop)])
        pages = [rng.randrange(world_size) * PER_RANK + rng.randrange(PER_RANK) for _ in range(-(-stop // SIZE))]
        segments.append(make_segment(key, start, stop, pages))
    layout = StepLayout(segments, world_size=world_size, page_size=SIZE, pages_per_rank=PER_RANK)
    for index, segment in enumerate(segments):
        positions = np.concatenate([layout.positions(index, rank) for rank in range(world_size)])
        assert sorted(positions.tolist()) == list(range(segment.start, segment.stop))
        assert layout.num_keys[index].sum() == segment.stop
    for rank in range(world_size):
        keys = [row for span in layout.kv_layout[rank] for row in range(span.start, span.stop)]
        assert len(keys) == layout.num_keys[:, rank].sum() == len(layout.key_slots(rank))
        for key, slot in zip(keys, layout.key_slots(rank).tolist(), strict=True):
            index = int(np.searchsorted(layout.bounds, key, side="right")) - 1
            position = key - layout.bounds[index]
            page = segments[index].pages[position // SIZE]
            assert (page // PER_RANK, page % PER_RANK * SIZE + position % SIZE) == (rank, slot)
        queries = [row for span in layout.q_layout[rank] for row in range(span.start, span.stop)]
        own = [layout.bounds[i] + layout.positions(i, rank) for i in range(len(segments))]
        assert queries == np.concatenate(own).tolist()


@pytest.mark.parametrize("world_size", [1, 3])
def test_pages_that_a_step_fills_and_who_looks_at_whom(world_size):
    rng = random.Random(world_size)
    for _ in range(50):
        segments = []
        for key in range(3):
            stop = rng.randint(1, 60)
            pages = [rng.randrange(world_size) * PER_RANK + rng.randrange(PER_RANK) for _ in range(stop // SIZE + 1)]
            segments.append(make_segment(key, rng.randrange(stop), stop, pages))
        layout = StepLayout(segments, world_size=world_size, page_size=SIZE, pages_per_rank=PER_RANK)
        filled = [
            int(segment.pages[position // SIZE])
            for segment in segments
            for position in range(segment.start, segment.stop)
            if position % SIZE == SIZE - 1
        ]
        ranks = range(world_size)
        assert [pages.tolist() for pages in layout.filled_pages] == [
            [page for page in filled if page // PER_RANK == rank] for rank in ranks
        ]
        for rank in ranks:
            held = [set((s.pages[: -(-s.stop // SIZE)] // PER_RANK).tolist()) for s in segments]
            computing = [bool(len(layout.positions(index, rank))) for index in range(3)]
            for other in ranks:
                met = any(other in holders for holders, is_here in zip(held, computing, strict=True) if is_here)
                assert layout.looks_at(rank, other) == (met and rank != other)


class Sink:
    def __init__(self, *, fails=False):
        self.sent, self.commits, self.aborts, self.fails = [], [], [], fails

    def send(self, layer_idx, page_idxs, pages):
        if self.fails:
            raise ValueError("no")
        self.sent += [(layer_idx, idx, page) for idx, page in zip(page_idxs, pages, strict=True)]

    def commit(self, payload):
        self.commits.append(payload)

    def abort(self, reason):
        self.aborts.append(reason)


def make_pool(*, num_layers):
    return PagePool(KVLayout(num_layers, 1, 8, SIZE, "float32", "hnd"), 1)


def test_a_rank_ships_its_own_pages_once_and_commits_at_the_end():
    exports = RankExports(OwnPages(1, PER_RANK), make_pool(num_layers=2))
    sink, other = Sink(), Sink()
    exports.open("r", [sink, other])
    pages = [100, 3, 101, 102, 7, 103]  # rank 1 has indices 0, 2, 3, 5
    steps = [
        Step((make_segment(1, 32, 64, pages, samples=False, export="r"),)),  # two pages came from the prefix cache
        Step((make_segment(2, 0, 5, [105]), make_segment(1, 64, 90, pages, export="r"))),
    ]
    for step in steps:
        on_layer = exports.begin(step)
        for layer_idx in range(2):
            on_layer(layer_idx)
        exports.end(step)
    wanted = {(layer, idx, pages[idx] - 100) for layer in range(2) for idx in (0, 2, 3, 5)}
    for each in (sink, other):
        assert set(each.sent) == wanted
        assert len(each.sent) == len(wanted)
        assert each.commits == [b""]
    assert exports.begin(steps[0]) is None


def test_an_export_that_fails_ends_alone():
    exports = RankExports(OwnPages(0, PER_RANK), make_pool(num_layers=1))
    bad, good = Sink(fails=True), Sink()
    exports.open("bad", [bad])
    exports.open("good", [good])
    step = Step((make_segment(1, 0, 16, [5], export="bad"), make_segment(2, 0, 16, [6], export="good")))
    exports.begin(step)(0)
    exports.end(step)
    assert bad.aborts == ["export failed: no"]
    assert bad.commits == []
    assert (good.sent, good.commits) == ([(0, 0, 6)], [b""])
