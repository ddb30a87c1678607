"""A deployment with an adapter: prefill and decode workers, and all their ranks, run the adapted model."""

import asyncio

import pytest
import torch

from longctx.messages import SamplingParams
from tests.cluster.small_cluster import make_config, start_cluster
from tests.longctx.adapters.adapted_models import INPUT_IDS, make_adapter
from tests.longctx.engines import make_request


@pytest.mark.parametrize("method", ["dora", "series", "parallel"])
def test_text_is_that_of_the_adapted_model(tmp_path, method):
    base, adapter, model = make_adapter(tmp_path, "llama", method)
    prompt = INPUT_IDS[0].tolist()
    with torch.no_grad():
        generated = model.generate(INPUT_IDS, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    config = make_config(base, prefill_ranks=2, decode_ranks=2, adapter=str(adapter))
    request = make_request("a", prompt, SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True))

    async def serve():
        async with start_cluster(config) as cluster:
            return await cluster.answer(request)

    (answer,) = asyncio.run(serve())
    assert list(answer.token_ids) == generated[0, len(prompt) :].tolist()
