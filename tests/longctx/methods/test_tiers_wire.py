"""Blocks that travel between workers whose blocks lie below, over real transports: out of a tier, into a tier."""

import queue
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from cluster.first_tokens import decode_first_tokens
from cluster.prefill_side import StreamExport
from longctx.attention.config import AttentionConfig
from longctx.engine.build import build_engine
from longctx.engine.config import EngineConfig
from longctx.models.config import ModelConfig
from longctx.shards.exports import OwnPages
from memory.config import TransportConfig
from memory.layout import MIN_CACHE
from memory.tiered_pages import TieredPages
from memory.transport import TRANSPORTS
from tests.longctx.engines import GREEDY, check_pages, collect, make_request, run
from tests.longctx.methods.test_landmark_inference import BLOCK, METHOD, TOP_K, make_prompt, record_logits
from tests.tiny_checkpoints import make_checkpoint

WAIT_S = 20.0
NUM_TOKENS = 20
PARAMS = replace(GREEDY, max_tokens=NUM_TOKENS)
CONFIG = TransportConfig(host="127.0.0.1", frame_bytes="16KiB", lease_ttl_s=5.0, send_timeout_s=2.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("landmark"), "llama", longctx_attention=METHOD)


def make_engine(
    folder, blocks, *, num_near=128 // BLOCK + 8 + MIN_CACHE, num_below=500, dtype="float32", **options: Any
):
    """With tiers, ``num_near`` pages are near and ``num_below`` below: far fewer near than the prompts have."""
    model = ModelConfig(path=str(folder), device="cpu", dtype=dtype)
    page_bytes = 8448 if dtype == "float32" else 4224
    make_pool = options.pop("make_pool", None)
    attention = AttentionConfig(top_k=TOP_K)
    if blocks != "near":
        attention = replace(attention, blocks=blocks, blocks_bytes=str(num_below * page_bytes))
    options = {"num_threads": 1, "max_batch_tokens": 128, "max_sequences": 4} | options
    kv_bytes = "8MiB" if blocks == "near" else str(num_near * page_bytes)
    engine = build_engine(model, EngineConfig(kv_bytes=kv_bytes, **options), attention=attention, make_pool=make_pool)
    assert engine.pool.layout.page_bytes == page_bytes
    return engine


class Wire:
    """A prefill engine, a decode engine and a transport between them."""

    def __init__(
        self, folder, name, prefill_blocks, decode_blocks, *, decode_options=None, make=make_engine, **options
    ):
        transport = TRANSPORTS.get(name)
        self.prefill = make(folder, prefill_blocks, make_pool=transport.allocate, **options)
        self.decode = make(folder, decode_blocks, **(options | (decode_options or {})))
        self.events = queue.Queue()
        self.receiver = transport.make_receiver(
            self.decode.shipped_pool,
            CONFIG,
            on_commit=lambda request_id, payload: self.events.put((request_id, payload)),
            on_failed=lambda request_id, reason: self.events.put((request_id, reason)),
        )
        self.sender = transport.make_sender(self.prefill.shipped_pool, CONFIG)

    def begin(self, request):
        """Reserve, grant and queue; the reservation."""
        reservation = self.decode.reserve(request)
        assert reservation is not None
        first, last = reservation.first_page_idx, reservation.first_page_idx + len(reservation.pages)
        grant = self.receiver.grant(
            request.request_id,
            reservation.pages,
            page_idxs=range(first, last),
            num_tokens=len(request.prompt_token_ids),
        )
        export = StreamExport(OwnPages(), lambda reason: None)
        export.streams.append(self.sender.open(grant, on_acked=lambda: None, on_failed=lambda reason: None))
        self.prefill.add(request, export=export)
        return reservation

    def arrive(self, request):
        """Wait for the KV; the deltas of the first tokens."""
        request_id, payload = self.events.get(timeout=WAIT_S)
        assert request_id == request.request_id and isinstance(payload, bytes), payload
        self.prefill.export_done(request_id)
        return self.decode.attach(request_id, decode_first_tokens(payload))

    def ship(self, request):
        """All of it."""
        self.begin(request)
        run(self.prefill)
        return self.arrive(request)


@contextmanager
def make_wire(*args, **options):
    wire = Wire(*args, **options)
    try:
        yield wire
        for engine in (wire.prefill, wire.decode):
            check_pages(engine)
            assert engine.stats().num_pages_used == 0
            check_frames(engine)
        assert wire.receiver.num_leases == 0
    finally:
        wire.sender.close()
        wire.receiver.close()


def check_frames(engine):
    """Frames are free but for pages that go down before the next step."""
    pages = engine.pool
    if isinstance(pages, TieredPages):
        staged = (pages._staged_P >= 0).nonzero()[:, 0].tolist()
        assert set(staged) == {*pages._filled, *pages._final}
        assert len(pages._free_frames) + len(staged) == pages._num_staging


PLACES = [
    ("tcp", "host", "host"), ("shared_memory", "host", "host"), ("tcp", "file", "file"),
    ("tcp", "near", "host"), ("tcp", "host", "near"), ("shared_memory", "near", "file"),
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("transport", "prefill_blocks", "decode_blocks"), PLACES)
def test_the_receiver_goes_on_bit_for_bit(folder, transport, prefill_blocks, decode_blocks, dtype):
    """Prompts of one token to more blocks than fit near, at and beside the borders of blocks and steps."""
    alone = make_engine(folder, "near", dtype=dtype, prefix_cache=False)
    expected = record_logits(alone)
    with make_wire(
        folder, transport, prefill_blocks, decode_blocks, dtype=dtype, decode_options={"prefix_cache": False}
    ) as wire:
        actual = record_logits(wire.decode)
        for length in (1, BLOCK - 1, BLOCK, 128, 131, 900):
            request = make_request("r", make_prompt(length, length), PARAMS)
            token_ids = collect([*wire.ship(request), *run(wire.decode)])
            alone.add(request)
            assert collect(run(alone)) == token_ids
            steps = [logits for logits in expected if len(logits)][1:]
            assert len(actual) == len(steps) == NUM_TOKENS - 1
            assert all(torch.equal(own, theirs) for own, theirs in zip(actual, steps, strict=True))
            actual.clear()
            expected.clear()


@pytest.mark.parametrize("blocks", ["host", "file"])
def test_what_is_sent_is_what_near_pages_are(folder, blocks):
    """Landmarks included, also of a prefix that was computed for an earlier prompt."""
    held = []
    for place in ("near", blocks):
        with make_wire(folder, "tcp", place, place) as wire:
            wire.ship(make_request("a", make_prompt(1, 400)))
            wire.begin(make_request("b", [*make_prompt(1, 300), *make_prompt(2, 100)]))
            run(wire.prefill)
            parts = [each._requests[name].sequences[0] for each, name in ((wire.prefill, "b"), (wire.decode, "a"))]
            pools = (wire.prefill.shipped_pool, wire.decode.shipped_pool)
            held += [pool.storage[:, part.pages[:25]].clone() for pool, part in zip(pools, parts, strict=True)]
            wire.arrive(make_request("b", make_prompt(1, 1)))
            assert wire.prefill.stats().num_cached_tokens == 18 * BLOCK
            run(wire.decode)
    assert held[0].any()
    assert torch.equal(held[0], held[2])
    assert torch.equal(held[1], held[3])


def test_forks_preemption_and_prefixes(folder):
    """Six sequences that do not fit below together, two of them of one prompt, others with its prefix."""
    prompts = [make_prompt(seed, 100) for seed in range(4)]
    prompts.append([*prompts[0][:70], *make_prompt(9, 30)])
    params = [replace(GREEDY, max_tokens=60, n=1 + (idx == 0)) for idx in range(len(prompts))]
    alone = make_engine(folder, "near", prefix_cache=False)
    expected = {}
    for idx, prompt in enumerate(prompts):
        alone.add(make_request(str(idx), prompt, params[idx]))
        expected |= collect(run(alone))
    options = {"num_below": 38, "max_sequences": 8, "num_near": 128 // BLOCK + 16 + MIN_CACHE}
    with make_wire(folder, "tcp", "host", "host", decode_options=options) as wire:
        deltas = []
        for idx, prompt in enumerate(prompts):
            deltas += wire.ship(make_request(str(idx), prompt, params[idx]))
            deltas += wire.decode.step()
        assert collect([*deltas, *run(wire.decode)]) == expected
        assert wire.decode.stats().num_preemptions > 0
        assert wire.decode.cache.num_idle > 0


def test_pages_that_were_another_sequences_a_moment_ago(folder):
    """Those are fetched ahead while they are written: what arrived counts."""
    alone = make_engine(folder, "near", prefix_cache=False)
    requests = {name: make_request(name, make_prompt(seed, 900), PARAMS) for seed, name in enumerate("abc")}
    expected = {}
    for request in requests.values():
        alone.add(request)
        expected |= collect(run(alone))
    with make_wire(folder, "shared_memory", "host", "host", prefix_cache=False, num_below=130) as wire:
        wire.ship(requests["b"])
        deltas = [*wire.ship(requests["a"])]
        pages = wire.decode._requests["a"].sequences[0].pages.copy()
        while "a" in wire.decode._requests:
            wire.decode.step()
        reservation = wire.begin(requests["c"])
        assert set(reservation.pages) & set(pages)
        tiers = wire.decode.pool
        assert isinstance(tiers, TieredPages)
        stale = torch.tensor(pages)[:16]
        for layer_idx in range(tiers.layout.num_layers):
            tiers._fetch_ahead(layer_idx, stale)
        run(wire.prefill)
        deltas = [*wire.arrive(requests["c"]), *run(wire.decode)]
        assert collect(deltas)["c", 0] == expected["c", 0]


def test_prompts_that_nobody_has_taken_yet_hold_no_frames(folder):
    """More than decode at one time, each with a page that is not full; those that end badly give everything back."""
    with make_wire(folder, "tcp", "host", "host", decode_options={"num_below": 60, "max_sequences": 8,
                                                                  "num_near": 8 + 16 + MIN_CACHE},
                   max_sequences=2, num_near=8 + 4 + MIN_CACHE) as wire:  # fmt: skip
        requests = [make_request(str(idx), make_prompt(idx, 100 + idx), PARAMS) for idx in range(8)]
        for request in requests:
            wire.begin(request)
        assert wire.decode.reserve(make_request("more", make_prompt(8, 100), PARAMS)) is None
        for _ in range(3):
            wire.prefill.step()
        wire.prefill.cancel("7")
        run(wire.prefill)
        outcomes = dict(wire.events.get(timeout=WAIT_S) for _ in requests)
        assert outcomes["7"] == "the request was cancelled"
        wire.decode.release_reservation("7")
        alone = make_engine(folder, "near", prefix_cache=False)
        for request in requests[:7]:
            name = request.request_id
            wire.prefill.export_done(name)
            deltas = [*wire.decode.attach(name, decode_first_tokens(outcomes[name])), *run(wire.decode)]
            alone.add(request)
            assert collect(deltas) == collect(run(alone))


@pytest.mark.parametrize("transport", ["tcp", "shared_memory"])
def test_an_arrival_that_is_given_up_is_computed_here(folder, transport):
    """Half of it was written: none of that is seen later."""
    request = make_request("r", make_prompt(3, 600), PARAMS)
    alone = make_engine(folder, "near", prefix_cache=False)
    alone.add(request)
    expected = collect(run(alone))
    with make_wire(folder, transport, "host", "file") as wire:
        wire.begin(request)
        for _ in range(3):
            wire.prefill.step()
        wire.receiver.revoke("r")
        wire.decode.release_reservation("r")
        wire.prefill.cancel("r")
        assert wire.decode.stats().num_pages_used == 0
        wire.decode.add(request)
        assert collect(run(wire.decode)) == expected
        assert wire.events.empty()
