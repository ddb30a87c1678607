"""Groups that are fetched over ranks: each has its own copies below, and one rank would say the same."""

from dataclasses import replace

import pytest
import torch

from longctx.attention.config import AttentionConfig
from tests.longctx.engines import generate, make_request
from tests.longctx.methods.test_cca_engine import PARAMS, SMALL, SPEC, make_prompt, with_sizes
from tests.longctx.methods.test_core_fetch import fetch_engine
from tests.longctx.sharded_engine import sharded_engine
from tests.tiny_checkpoints import make_checkpoint

METHOD = AttentionConfig("cca", group_size=SPEC.group_size, window=SPEC.window, core_fetch=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


def check_alike(engine):
    """All ranks have the same below where it is held, which is nowhere in the end."""
    below = engine._scheduler._below
    assert below.num_free == below.num_pages and not any(below.refcounts)
    everywhere = [part._pages._below.below.storage for part in engine.parts]
    assert everywhere[0].any()
    for storage in everywhere[1:]:
        torch.testing.assert_close(*(x.view(torch.float32) for x in (storage, everywhere[0])), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("world_size", "blocks"), [(2, "file"), (3, "host")])
def test_answers_are_one_ranks(folder, world_size, blocks):
    """Of sequences alone and together, with groups that end in another rank's tokens; a rank without tokens, too."""
    requests = [make_request(str(length), make_prompt(length), PARAMS) for length in (2, 13, 61, 203)]
    expected = generate(fetch_engine(folder, 2), requests)
    method = replace(METHOD, blocks=blocks)
    with sharded_engine(folder, world_size, method=method, **SMALL | {"max_batch_tokens": 48}) as engine:
        assert generate(engine, requests) == expected
        alone = make_request("alone", make_prompt(150), PARAMS)
        assert generate(engine, [alone]) == generate(fetch_engine(folder, 2), [alone])
        check_alike(engine)


def test_sizes_forks_preemption_and_cancelling(folder):
    """Pages that are copied below, freed and copied to between two steps."""
    sizes = [(4, 8), (7, 7), (16, 40), (1, 1)]
    params = replace(PARAMS, temperature=1.0, seed=1, n=2, max_tokens=40, logprobs=None)
    requests = [make_request(str(i), make_prompt(90 + 11 * i), with_sizes(*own, params)) for i, own in enumerate(sizes)]
    expected = generate(fetch_engine(folder, 2), requests)
    page_bytes = fetch_engine(folder, 2).pool.layout.page_bytes
    method = replace(METHOD, blocks="host", blocks_bytes=str(24 * page_bytes))
    with sharded_engine(folder, 2, method=method, **SMALL | {"kv_bytes": str(40 * page_bytes)}) as engine:
        engine.add(make_request("gone", make_prompt(120), params))
        for _ in range(5):
            engine.step()
        engine.cancel("gone")
        assert generate(engine, requests) == expected
        assert engine.stats().num_preemptions > 0
        check_alike(engine)


def test_every_group_is_dense_attention(folder):
    request = make_request("r", make_prompt(203), PARAMS)
    expected = generate(fetch_engine(folder, 400), [request])
    method = replace(METHOD, core_fetch=400)
    with sharded_engine(folder, 2, method=method, **SMALL) as engine:
        assert generate(engine, [request]) == expected
