"""What the scheduler puts into a step, without a model: chunks, pages, rows, preemption."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from longctx.engine.rows import DecodeRows
from longctx.engine.scheduler import MAX_PREEMPTIONS, Scheduler
from longctx.engine.sequence import ActiveRequest, RopeLengths
from longctx.messages import GenerationRequest, SamplingParams
from memory.layout import KVLayout
from memory.pages import PagePool
from memory.prefix_cache import PrefixCache

PAGE_SIZE = 4
TOKENIZER = SimpleNamespace(eos_token_ids=frozenset(), decode=lambda ids, **_: "x" * len(ids))


def make_scheduler(num_pages=100, *, max_batch_tokens=32, max_sequences=8, prefix_cache=True, **options):
    pool = PagePool(KVLayout(1, 1, 4, PAGE_SIZE, "float32", "hnd"), num_pages)
    rows = DecodeRows(
        num_rows=2 * max_sequences,
        num_tokens=max_sequences + max_batch_tokens,
        num_table_pages=num_pages,
        page_size=PAGE_SIZE,
    )
    cache = PrefixCache(pool, enabled=prefix_cache)
    return Scheduler(cache, rows, max_batch_tokens=max_batch_tokens, max_sequences=max_sequences, **options)


def enqueue(scheduler, arrival, length, *, n=1, first_token=None, export=None):
    """Queue a prompt of distinct tokens; ``first_token`` makes prompts equal."""
    start = 1000 * arrival if first_token is None else first_token
    prompt = np.arange(start, start + length, dtype=np.int64)
    request = GenerationRequest(str(arrival), tuple(prompt.tolist()), SamplingParams(n=n, ignore_eos=True))
    active = ActiveRequest(
        request, prompt, arrival=arrival, seed=0, max_outputs=10_000, tokenizer=TOKENIZER, export=export
    )  # fmt: skip
    scheduler.enqueue(active.sequences[0])
    return active.sequences[0]


def step(scheduler, *, holders=()):
    """Schedule and pretend to compute; returns (arrival, start, stop) of the chunks. ``holders`` have pages, too."""
    chunks = scheduler.schedule()
    decoding = list(scheduler.rows.sequences)
    for chunk in chunks:
        chunk.sequence.num_computed = chunk.stop
        scheduler.remember(chunk.sequence)
    ended = [chunk.sequence for chunk in chunks if chunk.is_last]
    scheduler.rows.advance([7] * len(decoding))
    for sequence in decoding:
        sequence.num_computed += 1
        sequence.outputs.append(7)
    for sequence in ended:
        scheduler.prefilling.remove(sequence)
        sequence.active.is_forked = True
        sequence.outputs.append(7)
        scheduler.rows.add(sequence)
    check(scheduler, holders=holders)
    return [(chunk.sequence.active.arrival, chunk.start, chunk.stop) for chunk in chunks]


def check(scheduler, *, holders=()):
    """Every row says what its sequence says, and no page belongs to two sequences unless shared on purpose."""
    rows, holders = scheduler.rows, [*scheduler.rows.sequences, *scheduler.prefilling, *holders]
    for row, sequence in enumerate(rows.sequences):
        assert sequence.row == row
        assert rows.positions[row] == sequence.num_computed == sequence.num_tokens - 1
        assert rows.kv_lens[row] == sequence.num_tokens
        assert rows.input_ids[row] == sequence.outputs[-1]
        assert rows.tables[row, : len(sequence.pages)].tolist() == sequence.pages
    counts = np.bincount([page for s in holders for page in s.pages], minlength=scheduler.cache.pool.num_pages)
    assert counts.tolist() == scheduler.cache.pool.refcounts
    assert not any(sequence.pages for sequence in scheduler.waiting)


def test_prompts_are_cut_at_page_ends_first_come_first_served():
    scheduler = make_scheduler(max_batch_tokens=30)
    enqueue(scheduler, 1, 50)
    enqueue(scheduler, 2, 26)
    enqueue(scheduler, 3, 26)
    assert step(scheduler) == [(1, 0, 28)]
    assert step(scheduler) == [(1, 28, 50), (2, 0, 8)]
    assert [s.active.arrival for s in scheduler.rows.sequences] == [1]


def test_several_short_prompts_share_a_step():
    scheduler = make_scheduler()
    for arrival in (1, 2, 3):
        enqueue(scheduler, arrival, 7)
    assert step(scheduler) == [(1, 0, 7), (2, 0, 7), (3, 0, 7)]


@pytest.mark.parametrize("options, num_tokens", [({}, 16), ({"mixed_share": 0.5}, 32), ({"mixed_share": 1.0}, 60)])
def test_prefill_is_bounded_while_sequences_decode(options, num_tokens):
    scheduler = make_scheduler(max_batch_tokens=64, **options)
    enqueue(scheduler, 1, 3)
    step(scheduler)
    enqueue(scheduler, 2, 100)
    assert step(scheduler) == [(2, 0, num_tokens)]
    assert scheduler.pending_prefill_tokens == 100 - num_tokens


def test_short_prompts_have_half_of_every_step_beside_a_long_one():
    scheduler = make_scheduler(max_batch_tokens=32, num_pages=200)
    enqueue(scheduler, 1, 500)
    assert step(scheduler) == [(1, 0, 32)]
    enqueue(scheduler, 2, 30)
    enqueue(scheduler, 3, 10)
    assert step(scheduler) == [(1, 32, 64)]  # they are let in
    assert step(scheduler) == [(3, 0, 10), (2, 0, 4), (1, 64, 80)]
    assert step(scheduler)[:1] == [(2, 4, 8)]  # beside a decoding sequence prompts have less


def test_prompts_of_like_length_do_not_overtake():
    """Those with one prefix would be computed twice."""
    scheduler = make_scheduler(max_batch_tokens=32, num_pages=200)
    enqueue(scheduler, 1, 100)
    enqueue(scheduler, 2, 60)
    assert [step(scheduler) for _ in range(2)] == [[(1, 0, 32)], [(1, 32, 64)]]


def test_a_short_prompt_waits_behind_one_that_does_not_fit():
    scheduler = make_scheduler(max_batch_tokens=32, num_pages=40)
    enqueue(scheduler, 1, 100)
    step(scheduler)
    enqueue(scheduler, 2, 90)
    enqueue(scheduler, 3, 4)
    assert step(scheduler) == [(1, 32, 64)]
    assert step(scheduler) == [(1, 64, 96)]


def test_a_sequence_is_spared_after_several_preemptions():
    scheduler = make_scheduler(num_pages=12, prefix_cache=False)
    first, last = (enqueue(scheduler, arrival, 4) for arrival in (1, 2))
    step(scheduler)
    assert scheduler._latest() is last
    last.num_preemptions = MAX_PREEMPTIONS
    assert scheduler._latest() is first
    first.num_preemptions = MAX_PREEMPTIONS
    assert scheduler._latest() is last


def test_a_page_larger_than_the_batch_still_advances():
    scheduler = make_scheduler(max_batch_tokens=2)
    enqueue(scheduler, 1, 9)
    assert [step(scheduler) for _ in range(3)] == [[(1, 0, 4)], [(1, 4, 8)], [(1, 8, 9)]]


def test_a_prompt_that_does_not_fit_blocks_those_behind_it():
    scheduler = make_scheduler(num_pages=10)
    first = enqueue(scheduler, 1, 30)
    step(scheduler)
    enqueue(scheduler, 2, 16)
    enqueue(scheduler, 3, 2)
    assert step(scheduler) == [] and scheduler.is_blocked
    scheduler.drop(first)
    assert step(scheduler) == [(2, 0, 16), (3, 0, 2)]


def test_rows_limit_the_sequences_counting_n():
    scheduler = make_scheduler(max_sequences=4)
    enqueue(scheduler, 1, 4, n=3)
    enqueue(scheduler, 2, 4, n=2)
    enqueue(scheduler, 3, 4, n=1)
    assert [chunk.sequence.active.arrival for chunk in scheduler.schedule()] == [1]
    assert scheduler.has_rows(1) and not scheduler.has_rows(2)


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_the_latest_is_preempted_and_the_oldest_always_advances(prefix_cache):
    scheduler = make_scheduler(num_pages=12, prefix_cache=prefix_cache)
    sequences = [enqueue(scheduler, arrival, 8) for arrival in (1, 2, 3)]
    lengths = []
    for _ in range(38):
        step(scheduler)
        lengths.append([sequence.num_tokens for sequence in sequences])
    assert scheduler.num_preemptions > 0
    assert [after[0] - before[0] for before, after in pairwise(lengths)] == [1] * 37
    assert lengths[-1][0] > lengths[-1][1] >= lengths[-1][2]
    scheduler.drop(sequences[0])
    step(scheduler)
    assert sequences[1].row >= 0  # computed again, whole, in one step
    assert sequences[1].num_tokens == lengths[-1][1] + 1


def test_exports_are_not_preempted():
    scheduler = make_scheduler(num_pages=9)
    decoding = enqueue(scheduler, 1, 12)
    step(scheduler)
    exported = enqueue(scheduler, 2, 16, export=SimpleNamespace())
    scheduler.schedule()
    assert exported.pages
    for _ in range(8):
        scheduler.rows.advance([7])
        decoding.outputs.append(7)
        decoding.num_computed += 1
        scheduler._grow_decodes()
        if decoding.row < 0:
            break
    assert decoding in scheduler.waiting and len(exported.pages) == 4


def test_a_prefix_that_another_prompt_completes_meanwhile_is_adopted():
    scheduler = make_scheduler(max_batch_tokens=16)
    first = enqueue(scheduler, 1, 21, first_token=0)
    second = enqueue(scheduler, 2, 33, first_token=0)
    assert step(scheduler) == [(1, 0, 16)]
    assert step(scheduler) == [(1, 16, 21), (2, 16, 24)]  # 16 found when it was admitted
    assert second.pages[:4] == first.pages[:4]
    third = enqueue(scheduler, 3, 33, first_token=0)
    fourth = enqueue(scheduler, 4, 34, first_token=0)
    assert scheduler.allocate(third) and scheduler.allocate(fourth)
    scheduler.waiting.clear()
    scheduler.prefilling += [third, fourth]
    spans = []
    while scheduler.prefilling:
        spans += step(scheduler)
    assert third.pages[:8] == fourth.pages[:8]
    assert [span for span in spans if span[0] == 4] == [(4, 32, 34)]


def test_a_sequence_that_outgrows_its_rope_is_computed_again():
    lengths = RopeLengths(threshold=10, restart_length=10, is_binary=True)
    scheduler = make_scheduler(rope_lengths=lengths)
    sequence = enqueue(scheduler, 1, 8)
    spans = [step(scheduler) for _ in range(6)]
    assert spans == [[(1, 0, 8)], [], [], [(1, 0, 11)], [], []]
    assert sequence.rope_floor == 11


@pytest.mark.parametrize(
    ("lengths", "floor", "salt"),
    [
        (RopeLengths(), 50, ""),
        (RopeLengths(threshold=50), 50, ""),
        (RopeLengths(threshold=50), 51, "51"),
        (RopeLengths(threshold=50, is_binary=True), 51, "long"),
    ],
)
def test_rope_salts(lengths, floor, salt):
    assert lengths.salt(floor) == salt
