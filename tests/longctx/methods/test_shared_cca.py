"""CCA over ranks: all hold the same pages, each computes a part of the tokens, and one rank would say the same."""

from dataclasses import replace

import pytest

from longctx.attention.config import AttentionConfig
from longctx.messages import SamplingParams
from tests.longctx.engines import generate, hand_over, make_request, run
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


def test_a_long_sequence_takes_no_more_on_each_rank(folder):
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    with sharded_engine(folder, 2, method=METHOD, max_context=1024, **SMALL) as engine:
        engine.add(make_request("r", make_prompt(900), params))
        while not engine._rows.sequences:
            engine.step()
        entries = engine.stats().num_pages_used * 16
        assert entries <= 900 / SPEC.group_size + SPEC.window + SPEC.group_size + 3 * 16
        run(engine)
