"""Requests that go on behind tokens of another engine: texts, log probabilities and ends are those of one alone."""

from dataclasses import replace

import pytest

from cluster.delta_buffer import merge_deltas
from longctx.attention.config import AttentionConfig
from longctx.errors import RequestError
from longctx.messages import AttentionOptions
from tests.longctx.engines import GREEDY, make_engine, make_request, run
from tests.longctx.test_engine import SAMPLED, random_prompt
from tests.tiny_checkpoints import make_checkpoint

NUM_NEW = 24
SEEDED = replace(SAMPLED, n=1)
WAYS = {
    "greedy": GREEDY,
    "seeded": SEEDED,
    "penalties": replace(SEEDED, frequency_penalty=0.7, repetition_penalty=1.3, min_tokens=20),
    "logprobs": replace(SEEDED, logprobs=2, top_p=0.9),
    "several": replace(SAMPLED, n=3),
    "cores": replace(GREEDY, attention=AttentionOptions(4, 8)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("models") / "llama", "llama")


def answer(engine, request):
    """One delta for each token, by sequence."""
    engine.add(request)
    deltas = run(engine)
    assert engine.stats().num_pages_used == 0
    return {index: [d for d in deltas if d.index == index] for index in range(request.sampling.n)}


def cut(deltas, num_tokens):
    """Tokens of one sequence that a client has got, None if all, and the deltas it has still to get."""
    got = [token for delta in deltas[:num_tokens] for token in delta.token_ids]
    return None if num_tokens >= len(deltas) else tuple(got), deltas[num_tokens:]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("num_tokens", [0, 1, 7, NUM_NEW - 1])
def test_goes_on_as_if_nothing_had_been(folder, way, num_tokens):
    params = replace(WAYS[way], max_tokens=NUM_NEW, ignore_eos=True)
    method = AttentionConfig("cca") if way == "cores" else None
    options = {"attention": "torch", "page_size": 4, "method": method}
    request = make_request("r", random_prompt(3, 37), params)
    whole = answer(make_engine(folder, **options), request)
    cuts = [cut(deltas, num_tokens if index != 1 else len(deltas)) for index, deltas in whole.items()]
    resumed = replace(request, outputs=tuple(outputs for outputs, _ in cuts))
    found = answer(make_engine(folder, **options), resumed)
    for index, (_, rest) in enumerate(cuts):
        assert [replace(delta, logprobs=()) for delta in found[index]] == [replace(d, logprobs=()) for d in rest]
        expected = [entry.logprob for delta in rest for entry in delta.logprobs]
        assert [entry.logprob for delta in found[index] for entry in delta.logprobs] == pytest.approx(
            expected, abs=1e-5
        )


def test_text_that_is_held_back_is_not_lost(folder):
    params = replace(SEEDED, max_tokens=NUM_NEW, ignore_eos=True)
    request = make_request("r", random_prompt(3, 37), params)
    text = "".join(delta.text for delta in answer(make_engine(folder, attention="torch"), request)[0])
    request = replace(request, sampling=replace(params, stop=(text[9:14], "no such text")))
    deltas = answer(make_engine(folder, attention="torch"), request)[0]
    assert deltas[-1].finish_reason == "stop"
    for num_tokens in range(1, len(deltas)):
        outputs, rest = cut(deltas, num_tokens)
        resumed = answer(make_engine(folder, attention="torch"), replace(request, outputs=(outputs,)))[0]
        assert merge_deltas(resumed) == merge_deltas(rest)


@pytest.mark.parametrize(
    ("outputs", "changes", "words"),
    [
        (((1,),), {"n": 2}, "outputs of 1 sequences are not allowed with n=2"),
        ((None,), {}, "not all ended"),
        (((1,),), {"seed": None, "temperature": 1.0}, "without the seed"),
        (((1,) * 8,), {"max_tokens": 8}, "leave room for none: 8 in all"),
        (((-1,),), {}, "token ids that are not 0 to"),
    ],
)
def test_outputs_that_cannot_be(folder, outputs, changes, words):
    engine = make_engine(folder, attention="torch")
    request = replace(make_request("r", random_prompt(3, 9), replace(GREEDY, **changes)), outputs=outputs)
    with pytest.raises(RequestError, match=words):
        engine.add(request)
    assert not engine.has_work
