"""Groups whose cores score highest are seen token by token, wherever their tokens lie."""

from dataclasses import replace

import pytest
import torch

from longctx.attention.config import AttentionConfig, choose_method
from longctx.errors import ConfigError
from longctx.messages import SamplingParams
from longctx.models.attention_spec import CCASpec
from longctx.models.checkpoint import inspect_checkpoint
from tests.longctx.engines import COMPILED, make_engine, make_request, run
from tests.longctx.methods.cca_model import CCAModel
from tests.longctx.methods.test_cca_engine import PARAMS, SMALL, SPEC, generate, make_prompt, with_sizes
from tests.tiny_checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


def fetch_engine(folder, core_fetch, spec=SPEC, *, blocks="near", blocks_bytes="auto", **options):
    method = AttentionConfig(
        "cca", group_size=spec.group_size, window=spec.window, core_fetch=core_fetch, blocks=blocks,
        blocks_bytes=blocks_bytes,
    )  # fmt: skip
    return make_engine(folder, method=method, **(SMALL | options))


def check_kept(engine):
    below = engine._scheduler._below
    assert below.num_free == below.num_pages
    assert not any(below.refcounts)


@pytest.mark.parametrize("attention", [COMPILED, "torch"])
@pytest.mark.parametrize("core_fetch", [1, 3])
def test_equals_the_whole_forward(folder, attention, core_fetch):
    engine, model = fetch_engine(folder, core_fetch, attention=attention), CCAModel(folder, core_fetch=core_fetch)
    requests = [make_request(str(length), make_prompt(length), PARAMS) for length in (13, 61, 64, 90)]
    ids, logprobs = generate(engine, requests)
    for request in requests:
        name = request.request_id
        model.check(list(request.prompt_token_ids), ids[name], logprobs[name], SPEC, tolerance=1e-4)
    check_kept(engine)


@pytest.mark.parametrize("blocks", ["host", "file"])
@pytest.mark.parametrize("spec", [SPEC, CCASpec(16, 32), CCASpec(24, 24), CCASpec(1, 7)])
def test_fetching_every_group_is_dense_attention(folder, blocks, spec):
    """Of every token, from near pages, from below, and from the chunk that is being computed."""
    requests = [make_request(str(length), make_prompt(length), PARAMS) for length in (40, 150, 203)]
    wanted_ids, wanted = generate(make_engine(folder, **SMALL), requests)
    engine = fetch_engine(folder, 400, spec, blocks=blocks, max_batch_tokens=64)
    ids, logprobs = generate(engine, requests)
    assert ids == wanted_ids
    for name, entries in wanted.items():
        values, theirs = (torch.tensor([e.logprob for e in own]) for own in (logprobs[name], entries))
        torch.testing.assert_close(values, theirs, atol=1e-4, rtol=1e-4)
    check_kept(engine)


def test_chunks_and_company_change_nothing(folder):
    request = make_request("r", make_prompt(203), PARAMS)
    wanted, _ = generate(fetch_engine(folder, 2, max_batch_tokens=256), [request])
    others = [make_request(str(n), make_prompt(n), with_sizes(n, 40)) for n in (3, 8, 21)]
    engine = fetch_engine(folder, 2, max_batch_tokens=48)
    got, _ = generate(engine, [*others, request])
    assert got["r"] == wanted["r"]
    check_kept(engine)


@pytest.mark.parametrize("pages", [13, 64])
def test_without_room_near_or_below_the_latest_are_computed_again(folder, pages):
    params = SamplingParams(temperature=0.0, max_tokens=150, ignore_eos=True)
    requests = [make_request(str(i), make_prompt(40 + i, seed=i), params) for i in range(4)]
    wanted, _ = generate(fetch_engine(folder, 2), requests)
    page_bytes = fetch_engine(folder, 2).pool.layout.page_bytes
    below = "auto" if pages == 13 else str(20 * page_bytes)
    engine = fetch_engine(folder, 2, num_pages=pages, blocks="host", blocks_bytes=below)
    got, _ = generate(engine, requests)
    assert engine.stats().num_preemptions > 0
    assert got == wanted
    check_kept(engine)


def test_forks_share_what_is_kept(folder):
    params = replace(PARAMS, n=3, temperature=1.0, seed=1, max_tokens=40)
    together, alone = fetch_engine(folder, 2), fetch_engine(folder, 2)
    together.add(make_request("r", make_prompt(101), params))
    tokens, last = {}, {}
    for delta in run(together):
        tokens.setdefault(delta.index, []).extend(delta.token_ids)
        last[delta.index] = delta.logprobs[-1]
    check_kept(together)
    assert len({tuple(own) for own in tokens.values()}) == 3
    for index, own in tokens.items():
        prompt = make_prompt(101) + own[:-1]
        _, logprobs = generate(alone, [make_request("r", prompt, replace(PARAMS, max_tokens=1))])
        got, wanted = dict(last[index].top), dict(logprobs["r"][0].top)
        assert got == pytest.approx(wanted, abs=1e-4)


def test_a_cancelled_sequence_gives_back_what_is_kept(folder):
    engine = fetch_engine(folder, 2)
    engine.add(make_request("r", make_prompt(300), PARAMS))
    for _ in range(6):
        engine.step()
    engine.cancel("r")
    check_kept(engine)


def test_the_context_is_what_fits_below(folder):
    page_bytes = fetch_engine(folder, 2).pool.layout.page_bytes
    engine = fetch_engine(folder, 2, blocks="host", blocks_bytes=str(10 * page_bytes))
    assert engine.max_context == 160


@pytest.mark.parametrize(
    "options, message",
    [
        ({"name": "dense", "core_fetch": 2}, r"attention\.core_fetch=2 is not allowed with dense"),
        ({"name": "cca", "blocks": "file"}, r"attention\.blocks=file is not allowed .* or cca with attention\.core_"),
    ],
)
def test_options_that_do_not_go_together_are_refused(folder, options, message):
    with pytest.raises(ConfigError, match=message):
        choose_method(AttentionConfig(**options), inspect_checkpoint(str(folder)))
