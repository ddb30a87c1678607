"""CCA over ranks: all hold the same pages, each computes a part of the tokens, and one rank would say the same."""

from dataclasses import replace

import pytest

from longctx.attention.config import AttentionConfig
from longctx.messages import SamplingParams
from tests.longctx.engines import generate, hand_over, make_engine, make_request, run
from tests.longctx.methods.cca_model import CCAModel
from tests.longctx.methods.test_cca_engine import PARAMS, SMALL, SPEC, cca_engine, make_prompt, with_sizes
from tests.longctx.methods.test_cca_engine import check as check_with_model
from tests.longctx.sharded_engine import sharded_engine
from tests.tiny_checkpoints import make_checkpoint

METHOD = AttentionConfig(name="cca", group_size=SPEC.group_size, window=SPEC.window)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("attention", ["native", "torch"])
def test_equals_the_whole_forward(folder, world_size, attention):
    """Also where groups end in another rank's tokens, and where a rank has no token at all."""
    lengths = (1, 2, 5, 13, 61, 64, 203)
    requests = [make_request(str(length), make_prompt(length), PARAMS) for length in lengths]
    with sharded_engine(folder, world_size, method=METHOD, attention=attention, **SMALL) as engine:
        check_with_model(CCAModel(folder), engine, requests)
        check_with_model(CCAModel(folder), engine, [make_request("alone", make_prompt(150), PARAMS)])


def test_sizes_forks_and_preemption(folder):
    sizes = [(4, 8), (7, 7), (16, 40), (1, 1), (64, 64)]
    params = replace(PARAMS, temperature=1.0, seed=1, n=2, max_tokens=60, logprobs=None)
    requests = [make_request(str(i), make_prompt(90 + 11 * i), with_sizes(*own, params)) for i, own in enumerate(sizes)]
    expected = generate(cca_engine(folder), requests)
    layout = cca_engine(folder).pool.layout
    with sharded_engine(folder, 2, method=METHOD, **SMALL | {"kv_bytes": str(30 * layout.page_bytes)}) as engine:
        assert generate(engine, requests) == expected
        assert engine.stats().num_preemptions > 0


def test_rank_0_ships_what_all_computed(folder):
    decode, alone = cca_engine(folder), cca_engine(folder)
    requests = [make_request(str(n), make_prompt(n), PARAMS) for n in (4, 61, 203)]
    with sharded_engine(folder, 2, method=METHOD, **SMALL) as prefill:
        exports = {request.request_id: hand_over(prefill, decode, request) for request in requests}
        run(prefill)
        tokens = {}
        for request_id, export in exports.items():
            prefill.export_done(request_id)
            for delta in decode.attach(request_id, export.first):
                tokens.setdefault((request_id, 0), []).extend(delta.token_ids)
        assert prefill.stats().num_pages_used == 0
    for delta in run(decode):
        tokens[delta.request_id, 0].extend(delta.token_ids)
    assert tokens == generate(alone, requests)


@pytest.mark.parametrize("core_fetch", [0, 2])
def test_what_arrives_at_rank_0_is_handed_to_all(folder, core_fetch):
    """Forks of it, of which one may end at once, pages that others had before, and a request that is given up."""
    method = replace(METHOD, core_fetch=core_fetch)
    pool = {"attention": "native", **SMALL}
    prefill, alone = (
        make_engine(folder, method=method, ships=ships, **pool | {"kv_bytes": "4MiB"}) for ships in (True, False)
    )
    params = replace(PARAMS, temperature=1.0, seed=1, n=2, max_tokens=20, logprobs=None)
    requests = [make_request(str(n), make_prompt(n), params) for n in (4, 61, 203, 110)]
    tokens = {}

    def take(deltas):
        for delta in deltas:
            tokens.setdefault((delta.request_id, delta.index), []).extend(delta.token_ids)

    layout = alone.pool.layout
    options = SMALL | {"kv_bytes": str(70 * layout.page_bytes)}
    with sharded_engine(folder, 2, method=method, ships=True, attention="native", **options) as decode:
        for request in (*requests, make_request("gone", make_prompt(90), params)):
            export = hand_over(prefill, decode, request)
            run(prefill)
            prefill.export_done(request.request_id)
            take(decode.attach(request.request_id, export.first))
            if request.request_id == "gone":
                decode.cancel("gone")
            take(decode.step())
        take(run(decode))
        assert decode.stats().num_pages_used == prefill.stats().num_pages_used == 0
    expected = generate(alone, requests)
    assert {name: own for name, own in tokens.items() if name[0] != "gone"} == expected


def test_a_long_sequence_takes_no_more_on_each_rank(folder):
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    with sharded_engine(folder, 2, method=METHOD, max_context=1024, **SMALL) as engine:
        engine.add(make_request("r", make_prompt(900), params))
        while not engine._rows.sequences:
            engine.step()
        entries = engine.stats().num_pages_used * 16
        assert entries <= 900 / SPEC.group_size + SPEC.window + SPEC.group_size + 3 * 16
        run(engine)
