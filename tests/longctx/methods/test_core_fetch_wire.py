"""What travels where groups are fetched: cores, bounds and all tokens, out of what lies below and into it."""

from dataclasses import replace

import pytest

from longctx.attention.config import AttentionConfig
from longctx.engine.build import build_engine
from longctx.engine.config import EngineConfig
from longctx.models.config import ModelConfig
from tests.longctx.engines import GREEDY, collect, make_request, run
from tests.longctx.methods.test_cca_engine import SPEC, make_prompt, with_sizes
from tests.longctx.methods.test_core_fetch import check_kept
from tests.longctx.methods.test_landmark_inference import record_logits
from tests.longctx.methods.test_tiers_wire import WAIT_S, make_wire
from tests.tiny_checkpoints import make_checkpoint

NUM_TOKENS = 12
PARAMS = replace(GREEDY, max_tokens=NUM_TOKENS)
PAGE_BYTES = {"float32": 8192, "bfloat16": 4096}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


def make_engine(
    folder, blocks, *, num_near=100, num_below=200, dtype="float32", make_pool=None, ships=True, core_fetch=2, **options
):
    model, page_bytes = ModelConfig(path=str(folder), device="cpu", dtype=dtype), PAGE_BYTES[dtype]
    method = AttentionConfig("cca", group_size=SPEC.group_size, window=SPEC.window, core_fetch=core_fetch)
    if core_fetch:
        method = replace(method, blocks=blocks, blocks_bytes=str(num_below * page_bytes))
    options = {"num_threads": 1, "max_batch_tokens": 48, "max_sequences": 8, "page_size": 16} | options
    config = EngineConfig(kv_bytes=str(num_near * page_bytes), **options)
    engine = build_engine(model, config, attention=method, make_pool=make_pool, ships=ships)
    assert engine.pool.layout.page_bytes == page_bytes
    return engine


def fetch_wire(folder, transport="tcp", prefill_blocks="host", decode_blocks="host", **options):
    return make_wire(folder, transport, prefill_blocks, decode_blocks, make=make_engine, **options)


def check_below(wire):
    for engine in (wire.prefill, wire.decode):
        check_kept(engine)


PLACES = [
    ("tcp", "host", "host", "float32"), ("shared_memory", "host", "host", "float32"),
    ("tcp", "file", "file", "float32"), ("shared_memory", "host", "file", "bfloat16"),
    ("tcp", "file", "host", "bfloat16"),
]  # fmt: skip


@pytest.mark.parametrize(("transport", "prefill_blocks", "decode_blocks", "dtype"), PLACES)
def test_the_receiver_goes_on_bit_for_bit(folder, transport, prefill_blocks, decode_blocks, dtype):
    """Prompts of one token to many steps; groups that are pages, that are tokens, and those of the configuration."""
    alone = make_engine(folder, "host", dtype=dtype, ships=False)
    expected = record_logits(alone)
    with fetch_wire(folder, transport, prefill_blocks, decode_blocks, dtype=dtype) as wire:
        actual = record_logits(wire.decode)
        for length, params in [
            (1, PARAMS), (16, PARAMS), (61, PARAMS), (203, PARAMS), (500, PARAMS), (150, with_sizes(16, 40, PARAMS)),
            (90, with_sizes(1, 3, PARAMS)),
        ]:  # fmt: skip
            request = make_request("r", make_prompt(length), params)
            token_ids = collect([*wire.ship(request), *run(wire.decode)])
            alone.add(request)
            assert collect(run(alone)) == token_ids
            steps = [logits for logits in expected if len(logits)][1:]
            assert len(actual) == len(steps) == NUM_TOKENS - 1
            assert all((own == theirs).all() for own, theirs in zip(actual, steps, strict=True))
            actual.clear()
            expected.clear()
        check_below(wire)


def test_bytes_are_dense_kv_cores_and_bounds(folder):
    length = 500
    with fetch_wire(folder) as wire:
        wire.ship(make_request("r", make_prompt(length), PARAMS))
        core_pages = -(-(length // SPEC.group_size) // 16)
        assert wire.sender.bytes_shipped == (-(-length // 16) + 2 * core_pages) * PAGE_BYTES["float32"]
        run(wire.decode)
        check_below(wire)


@pytest.mark.parametrize("core_fetch", [0, 2])
def test_prompts_within_their_window_travel(folder, core_fetch):
    """All their tokens and cores: more pages than the tokens have."""
    with fetch_wire(folder, core_fetch=core_fetch) as wire:
        request = make_request("r", make_prompt(48), with_sizes(4, 64, PARAMS))
        wire.ship(request)
        assert wire.sender.bytes_shipped == (3 + (1 + (core_fetch > 0))) * PAGE_BYTES["float32"]
        run(wire.decode)


def test_forks_and_preemption_go_on_from_what_arrived(folder):
    prompts = [make_prompt(100, seed=seed) for seed in range(4)]
    params = [replace(GREEDY, max_tokens=50, n=1 + (idx == 0)) for idx in range(len(prompts))]
    alone, expected = make_engine(folder, "host", ships=False), {}
    for idx, prompt in enumerate(prompts):
        alone.add(make_request(str(idx), prompt, params[idx]))
        expected |= collect(run(alone))
    with fetch_wire(folder, "tcp", "file", "file", decode_options={"num_below": 34}) as wire:
        deltas = []
        for idx, prompt in enumerate(prompts):
            deltas += wire.ship(make_request(str(idx), prompt, params[idx]))
            deltas += wire.decode.step()
        assert collect([*deltas, *run(wire.decode)]) == expected
        assert wire.decode.stats().num_preemptions > 0
        check_below(wire)


@pytest.mark.parametrize(("transport", "blocks"), [("tcp", "file"), ("shared_memory", "host")])
def test_an_arrival_that_is_given_up_is_computed_here(folder, transport, blocks):
    """In the middle of it: nothing that was written is seen later, and nothing stays taken."""
    request = make_request("r", make_prompt(400), PARAMS)
    alone = make_engine(folder, "host", ships=False)
    alone.add(request)
    expected = collect(run(alone))
    with fetch_wire(folder, transport, blocks, blocks) as wire:
        for num_steps in (3, 9):  # before anything was sent, and after
            wire.begin(request)
            for _ in range(num_steps):
                wire.prefill.step()
            wire.receiver.revoke("r")
            wire.decode.release_reservation("r")
            wire.prefill.cancel("r")
            check_below(wire)
            assert wire.decode.stats().num_pages_used == 0
        wire.decode.add(request)
        assert collect(run(wire.decode)) == expected
        while not wire.events.empty():  # all of it may have been there before it was given up
            assert isinstance(wire.events.get()[1], bytes)


def test_a_sender_that_is_lost_leaves_nothing_taken(folder):
    request = make_request("r", make_prompt(400), PARAMS)
    with fetch_wire(folder) as wire:
        wire.begin(request)
        for _ in range(3):
            wire.prefill.step()
        wire.sender.close()
        request_id, reason = wire.events.get(timeout=WAIT_S)
        assert request_id == "r" and isinstance(reason, str)
        wire.decode.release_reservation("r")
        wire.prefill.cancel("r")
        check_below(wire)


def test_without_room_below_nothing_is_reserved(folder):
    with fetch_wire(folder, decode_options={"num_below": 30}) as wire:
        first, second = (make_request(name, make_prompt(300), PARAMS) for name in "ab")
        wire.begin(first)
        used, free = wire.decode.stats().num_pages_used, wire.decode._scheduler._below.num_free
        assert wire.decode.reserve(second) is None
        assert (wire.decode.stats().num_pages_used, wire.decode._scheduler._below.num_free) == (used, free)
        run(wire.prefill)
        tokens = collect([*wire.arrive(first), *run(wire.decode)])
        assert collect([*wire.ship(second), *run(wire.decode)])["b", 0] == tokens["a", 0]
        check_below(wire)


def test_pages_that_are_being_sent_stay(folder):
    """Another prompt is computed meanwhile, in pages that the first one would have given back."""
    first, second = make_request("a", make_prompt(300), PARAMS), make_request("b", make_prompt(310, seed=1), PARAMS)
    with fetch_wire(folder, "shared_memory") as wire:
        pool = wire.prefill.shipped_pool
        wire.begin(first)
        while wire.events.empty():
            wire.prefill.step()
        sequence = wire.prefill._requests["a"].sequences[0]
        pages = sequence.cores.lasting(sequence.pages, 300, 16)
        before = pool.storage[:, pages].clone()
        wire.prefill.add(second)
        run(wire.prefill)
        assert (pool.storage[:, pages] == before).all()
        wire.arrive(first)
        run(wire.decode)
