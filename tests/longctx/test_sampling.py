"""The sampler against the distributions written out in fp64, and against transformers' logits processors."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from longctx.engine.random_stream import draw_uniform
from longctx.engine.sampling import Sampler, SamplerState, validate
from longctx.errors import RequestError
from longctx.messages import SamplingParams

VOCAB = 3000
EOS = frozenset({7})


def make_state(params, *, seed=0, index=0, prompt=(1, 2, 3), outputs=()):
    state = SamplerState(params, seed=seed, index=index, prompt_token_ids=prompt, eos_token_ids=EOS)
    for token_id in outputs:
        state.append(token_id)
    return state


def sample(logits, states):
    return Sampler(logits.shape[-1], torch.device("cpu")).sample(logits.clone(), states)


def reference_probabilities(logits, params, prompt, outputs):
    """The distribution of the next token by transformers' processors and the OpenAI penalties, fp64 ``[V]``."""
    scores = logits.double()[None].clone()
    for token_id, bias in params.logit_bias:
        scores[0, token_id] += bias
    history = torch.tensor([[*prompt, *outputs]])
    if params.repetition_penalty != 1.0:
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(history, scores)
    for token_id in set(outputs):
        scores[0, token_id] -= params.presence_penalty + params.frequency_penalty * list(outputs).count(token_id)
    if len(outputs) < params.min_tokens:
        scores[0, list(EOS | set(params.stop_token_ids))] = -math.inf
    scores = TemperatureLogitsWarper(params.temperature)(history, scores)
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(history, scores)
    if params.top_p < 1.0:
        scores = TopPLogitsWarper(params.top_p)(history, scores)
    if params.min_p > 0:
        scores = MinPLogitsWarper(params.min_p)(history, scores)
    return scores[0].softmax(-1)


CASES = [
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1.3, top_k=5),
    SamplingParams(temperature=1.0, top_p=0.6),
    SamplingParams(temperature=1.0, top_p=0.05),
    SamplingParams(temperature=1.0, min_p=0.2),
    SamplingParams(temperature=0.9, top_k=40, top_p=0.8, min_p=0.05),
    SamplingParams(temperature=1.0, presence_penalty=1.5, frequency_penalty=0.5, repetition_penalty=1.4, top_k=30),
    SamplingParams(temperature=1.0, logit_bias=((11, 6.0), (12, -100.0)), min_tokens=9, stop_token_ids=(11,), top_k=20),
]


@pytest.mark.parametrize("params", CASES)
def test_frequencies_are_the_distribution(params):
    torch.manual_seed(0)
    logits = torch.randn(60) * 2
    prompt, outputs = (1, 2, 3, 3), (4, 5, 5, 11)
    want = reference_probabilities(logits, params, prompt, outputs)
    num_draws = 4000
    states = [make_state(params, seed=seed, prompt=prompt, outputs=outputs) for seed in range(num_draws)]
    got, _ = sample(logits.repeat(num_draws, 1), states)
    counts = np.bincount(got, minlength=60)
    expected = want.numpy() * num_draws
    assert not counts[expected == 0].any(), "a token was drawn that cannot be"
    large = expected >= 5
    statistic = ((counts - expected)[large] ** 2 / expected[large]).sum()
    degrees = max(1, int(large.sum()) - 1)
    assert statistic < degrees + 5 * math.sqrt(2 * degrees), f"chi-square {statistic:.1f} at {degrees} degrees"


@pytest.mark.parametrize("top_p", [0.3, 0.97, 0.9999])
def test_nucleus_of_a_large_flat_vocabulary(top_p):
    torch.manual_seed(1)
    logits = torch.randn(VOCAB) * 0.1  # more than the first candidates are needed
    kept = reference_probabilities(logits, SamplingParams(temperature=1.0, top_p=top_p), (), ()) > 0
    states = [make_state(SamplingParams(temperature=1.0, top_p=top_p), seed=seed) for seed in range(300)]
    got, _ = sample(logits.repeat(300, 1), states)
    assert kept[torch.tensor(got)].all()
    assert len(set(got)) > 100


@pytest.mark.parametrize(
    "params", [*CASES, SamplingParams(temperature=0.0), SamplingParams(temperature=0.0, min_tokens=9)]
)
def test_a_row_does_not_depend_on_its_batch(params):
    torch.manual_seed(2)
    logits = torch.randn(len(CASES) + 1, VOCAB)
    company = [make_state(case, seed=50 + i, outputs=(4, 4)) for i, case in enumerate(CASES)]
    alone = [sample(logits[-1:], [make_state(params, seed=seed, outputs=(4,))])[0][0] for seed in range(20)]
    together = [sample(logits, [*company, make_state(params, seed=seed, outputs=(4,))])[0][-1] for seed in range(20)]
    assert alone == together


def test_greedy_takes_the_lowest_of_equal_logits():
    logits = torch.zeros(2, 50)
    logits[0, [9, 4]] = 1.0
    assert sample(logits, [make_state(SamplingParams(temperature=0.0))] * 2)[0] == [4, 0]


def test_seed_index_and_position_each_change_the_draw():
    draws = {draw_uniform(seed, index, position) for seed in range(9) for index in range(9) for position in range(9)}
    assert len(draws) == 729
    assert all(0 <= draw < 1 for draw in draws)
    mean = np.mean([draw_uniform(-(2**40), 1, position) for position in range(4000)])
    assert abs(mean - 0.5) < 0.02


def test_fork_keeps_the_history():
    params = SamplingParams(temperature=1.0, frequency_penalty=2.0)
    source = make_state(params, outputs=(4, 4))
    twin = source.fork(3)
    source.append(5)
    assert (twin.num_output, twin.index) == (2, 3)
    first, second = torch.zeros(10), torch.zeros(10)
    twin.adjust(first)
    make_state(params, outputs=(4, 4)).adjust(second)
    assert torch.equal(first, second)


def test_logprobs_are_those_of_the_raw_logits():
    torch.manual_seed(3)
    logits = torch.randn(2, 40)
    params = SamplingParams(temperature=0.3, repetition_penalty=1.8, logprobs=3)
    token_ids, logprobs = sample(logits, [make_state(params), make_state(SamplingParams(temperature=1.0))])
    want = logits[0].double().log_softmax(-1)
    assert logprobs[1] is None
    assert logprobs[0].logprob == pytest.approx(float(want[token_ids[0]]), abs=1e-5)
    assert [token_id for token_id, _ in logprobs[0].top] == want.topk(3).indices.tolist()
    assert [value for _, value in logprobs[0].top] == pytest.approx(want.topk(3).values.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 129),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("min_p", 1.5),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("logprobs", 21),
        ("stop", ("a", "")),
        ("stop", tuple("abcdefghijklmnopq")),
        ("stop_token_ids", (VOCAB,)),
        ("logit_bias", ((-1, 1.0),)),
        ("logit_bias", ((1, 101.0),)),
        ("logit_bias", ((1, math.nan),)),
    ],
)
def test_bad_values_are_named(field, value):
    with pytest.raises(RequestError) as error:
        validate(replace(SamplingParams(), **{field: value}), vocab_size=VOCAB)
    assert error.value.param == field
    assert field in str(error.value)


def test_good_values_pass():
    for params in (
        SamplingParams(),
        SamplingParams(n=128, max_tokens=None, min_tokens=9, top_k=10**6, logprobs=20),
        *CASES,
    ):
        validate(params, vocab_size=VOCAB)
