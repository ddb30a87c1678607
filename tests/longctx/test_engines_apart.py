"""Prefill in one engine, decode in another: the answer is one engine's, and exports lose no page."""

from dataclasses import replace

import pytest
import torch

from longctx.errors import RequestError
from longctx.messages import FirstTokens
from tests.longctx.engines import GREEDY, check_pages, collect, generate, hand_over, make_engine, make_request, run
from tests.longctx.test_engine import LENGTHS, NUM_NEW, SAMPLED, random_prompt
from tests.tiny_checkpoints import make_checkpoint

PROMPTS = [random_prompt(seed, length) for seed, length in enumerate(LENGTHS[:5])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, replace(GREEDY, max_tokens=1), replace(SAMPLED, seed=None, n=2)])
@pytest.mark.parametrize("attention", ["auto", "torch"])
def test_prefill_and_decode_apart_equal_one_engine(folder, params, attention):
    options = {"page_size": 16, "attention": attention}
    prefill = make_engine(folder, max_batch_tokens=48, **options)
    decode = make_engine(folder, **options)
    requests = [make_request(str(i), prompt, params) for i, prompt in enumerate(PROMPTS)]
    for _ in range(2):  # the second time both sides find the prompts in their prefix caches
        exports = {}
        for request in requests[:3]:  # more than three times four sequences do not fit together
            exports[request.request_id] = hand_over(prefill, decode, request)
        assert run(prefill) == []
        assert prefill.stats().num_pages_used > 0
        deltas = []
        for request_id, export in exports.items():
            num_pages = prefill.pool.layout.num_pages(len(requests[int(request_id)].prompt_token_ids))
            assert sorted(export.announced) == [(layer, page) for layer in range(2) for page in range(num_pages)]
            prefill.export_done(request_id)
            deltas += decode.attach(request_id, export.first)
        deltas += run(decode)
        check_pages(prefill)
        assert prefill.stats().num_pages_used == decode.stats().num_pages_used == 0
        single = make_engine(folder, **options)
        seeds = {request_id: export.first.seed for request_id, export in exports.items()}
        same = [replace(r, sampling=replace(params, seed=seeds[r.request_id])) for r in requests[:3]]
        assert collect(deltas) == generate(single, same)
    assert prefill.stats().num_cached_tokens > 0


def test_reservations_take_pages_and_rows(folder):
    engine = make_engine(folder, attention="torch", page_size=4, num_pages=16, max_sequences=4)
    assert engine.reserve(make_request("a", random_prompt(0, 40), replace(GREEDY, n=3, max_tokens=4))) is not None
    assert engine.stats().num_pages_used == 10
    assert engine.reserve(make_request("b", random_prompt(1, 40))) is None  # no pages
    assert engine.reserve(make_request("b", [1], replace(GREEDY, n=2))) is None  # no rows
    assert engine.reserve(make_request("b", [1])) is not None
    assert not engine.has_work
    engine.add(make_request("c", [1]))
    assert engine.step() == [] and not engine.has_work  # waits for a row without turning in circles
    assert engine.reserve(make_request("d", [1])) is None
    engine.release_reservation("a")
    engine.cancel("b")
    assert engine.has_work
    assert len(collect(run(engine))["c", 0]) == NUM_NEW
    assert engine.stats().num_pages_used == 0


def test_attach_refuses_what_does_not_fit(folder):
    engine = make_engine(folder)
    with pytest.raises(RequestError, match="no pages are reserved for request 'x'"):
        engine.attach("x", FirstTokens((1,)))
    engine.reserve(make_request("x", [1, 2]))
    with pytest.raises(RequestError, match="2 first tokens came for n=1"):
        engine.attach("x", FirstTokens((1, 2)))


def test_cancelled_and_failing_exports_tell_and_free(folder, monkeypatch):
    prefill, decode = (make_engine(folder, page_size=16, max_batch_tokens=32) for _ in range(2))
    exports = [hand_over(prefill, decode, make_request(str(i), random_prompt(i, 100))) for i in range(3)]

    def fail(*_):
        raise OSError("peer is gone")

    monkeypatch.setattr(exports[1], "on_layer", fail)
    prefill.step()
    prefill.cancel("0")
    assert exports[0].failure == "the request was cancelled"
    run(prefill)
    assert exports[1].failure == "export failed: peer is gone" and exports[1].first is None
    assert exports[2].first is not None and exports[2].failure is None
    assert prefill.stats().num_pages_used == 7  # the last one's, until it is acknowledged
    prefill.export_done("2")
    prefill.export_done("2")
    assert prefill.stats().num_pages_used == 0


def test_kv_of_one_pool_is_what_the_other_computes(folder):
    """The exported bytes are final when announced: later chunks do not change them."""
    prefill, decode = (make_engine(folder, page_size=16, max_batch_tokens=16) for _ in range(2))
    request = make_request("a", random_prompt(0, 75))
    export = hand_over(prefill, decode, request)
    run(prefill)
    pages = prefill._requests["a"].sequences[0].pages
    assert torch.equal(prefill.pool.storage[:, pages], decode.pool.storage[:, list(export.reservation.pages)])
