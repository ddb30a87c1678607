"""CCA in the engine: what it generates is what the model computes at once, and pages follow the window."""

import random
from collections import defaultdict
from dataclasses import replace

import pytest
import torch

from longctx.attention.config import AttentionConfig
from longctx.engine.config import EngineConfig
from longctx.errors import QueueFullError, RequestError
from longctx.llm import LLM
from longctx.messages import AttentionOptions, SamplingParams
from longctx.models.attention_spec import CCASpec
from longctx.models.config import ModelConfig
from tests.longctx.engines import COMPILED, check_pages, make_engine, make_request, run
from tests.longctx.methods.cca_model import CCAModel
from tests.tiny_checkpoints import make_checkpoint

SPEC = CCASpec(group_size=5, window=9)
PARAMS = SamplingParams(temperature=0.0, max_tokens=13, ignore_eos=True, logprobs=5)
TOLERANCE = 1e-4
SMALL = {"page_size": 16, "max_batch_tokens": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def model(folder):
    return CCAModel(folder)


def make_prompt(length, seed=0):
    rng = random.Random(1000 * length + seed)
    return [rng.randrange(256) for _ in range(length)]


def cca_engine(folder, spec=SPEC, **options):
    method = AttentionConfig(name="cca", group_size=spec.group_size, window=spec.window)
    return make_engine(folder, method=method, **(SMALL | options))


def with_sizes(group_size, window, params=PARAMS):
    return replace(params, attention=AttentionOptions(group_size, window))


def generate(engine, requests):
    """Token ids and log probabilities by request; all pages come back."""
    for request in requests:
        engine.add(request)
    ids, logprobs = defaultdict(list), defaultdict(list)
    for delta in run(engine):
        ids[delta.request_id] += delta.token_ids
        logprobs[delta.request_id] += delta.logprobs
    assert engine.stats().num_pages_used == 0
    return ids, logprobs


def check(model, engine, requests, spec=SPEC, *, tolerance=TOLERANCE):
    ids, logprobs = generate(engine, requests)
    for request in requests:
        options, name = request.sampling.attention, request.request_id
        own = spec if options is None else replace(spec, group_size=options.group_size, window=options.window)
        model.check(list(request.prompt_token_ids), ids[name], logprobs[name], own, tolerance=tolerance)


@pytest.mark.parametrize("attention", [COMPILED, "torch"])
def test_every_length_modulo_the_group_equals_the_whole_forward(folder, model, attention):
    lengths = (1, 4, 5, 9, 13, 14, *range(60, 66))
    requests = [make_request(str(length), make_prompt(length), PARAMS) for length in lengths]
    check(model, cca_engine(folder, attention=attention), requests)


@pytest.mark.parametrize("group_size", [1, 3, 16, 24])
@pytest.mark.parametrize("max_batch_tokens", [16, 48])
def test_chunks_may_end_within_groups(folder, model, group_size, max_batch_tokens):
    spec = CCASpec(group_size, window=32)
    requests = [make_request(str(length), make_prompt(length), PARAMS) for length in (150, 157)]
    check(model, cca_engine(folder, spec, max_batch_tokens=max_batch_tokens), requests, spec)


def test_sequences_of_different_sizes_share_a_batch(folder, model):
    sizes = [(4, 8), (7, 7), (16, 40), (1, 1), (5, 500), (64, 64)]
    requests = [make_request(str(i), make_prompt(90 + 11 * i), with_sizes(*own)) for i, own in enumerate(sizes)] + [
        make_request("own", make_prompt(120), PARAMS)
    ]
    check(model, cca_engine(folder, max_batch_tokens=64), requests)


@pytest.mark.parametrize("core_position", ["last", "middle", "mean"])
@pytest.mark.parametrize("head_pooling", ["weights", "query"])
def test_cores_are_pooled_and_placed_as_the_checkpoint_says(tmp_path, core_position, head_pooling):
    entry = {"name": "cca", "group_size": 6, "window": 12, "core_position": core_position, "head_pooling": head_pooling}
    folder = make_checkpoint(tmp_path, "llama", longctx_attention=entry)
    spec = CCASpec(6, 12, core_position, head_pooling)
    check(CCAModel(folder), make_engine(folder, **SMALL), [make_request("r", make_prompt(77), PARAMS)], spec)


@pytest.mark.parametrize(
    "family, overrides",
    [
        ("qwen3", {}),
        ("qwen2", {}),
        ("gemma", {}),
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}),
    ],
)
def test_families(tmp_path, family, overrides):
    folder = make_checkpoint(tmp_path, family, **overrides)
    check(CCAModel(folder), cca_engine(folder), [make_request(str(n), make_prompt(n), PARAMS) for n in (66, 83)])


@pytest.mark.parametrize("attention", [COMPILED, "torch"])
def test_bfloat16(tmp_path, attention):
    """As near to float32 as transformers in bfloat16 is: cores of stored keys, rotated back, are no coarser."""
    folder = make_checkpoint(tmp_path, "llama", dtype="bfloat16")
    exact, rounded = (CCAModel(folder, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    engine, prompt = cca_engine(folder, attention=attention), make_prompt(140)
    assert engine.stats().dtype == "bfloat16"
    ids, logprobs = generate(engine, [make_request("r", prompt, replace(PARAMS, max_tokens=40))])
    wanted, theirs = (m.logits(prompt + ids["r"][:-1], SPEC)[139:].log_softmax(-1) for m in (exact, rounded))
    top = torch.tensor([[token_id for token_id, _ in entry.top] for entry in logprobs["r"]])
    ours = torch.tensor([[value for _, value in entry.top] for entry in logprobs["r"]])
    error, their_error = ((x - wanted.gather(1, top)).abs().mean() for x in (ours, theirs.gather(1, top)))
    assert error < 1.5 * their_error


def test_chunks_and_company_change_nothing(folder):
    request = make_request("r", make_prompt(203), PARAMS)
    wanted, _ = generate(cca_engine(folder, max_batch_tokens=256), [request])
    others = [make_request(str(n), make_prompt(n), with_sizes(n, 40)) for n in (3, 8, 21)]
    got, _ = generate(cca_engine(folder, max_batch_tokens=48), [*others, request])
    assert got["r"] == wanted["r"]


def test_preempted_sequences_are_computed_again_to_the_same_tokens(folder):
    params = SamplingParams(temperature=0.0, max_tokens=150, ignore_eos=True)
    requests = [make_request(str(i), make_prompt(40 + i, seed=i), params) for i in range(4)]
    wanted, _ = generate(cca_engine(folder), requests)
    engine = cca_engine(folder, num_pages=13)
    got, _ = generate(engine, requests)
    assert engine.stats().num_preemptions > 0
    assert got == wanted


def test_forks_share_full_pages_and_go_on_alone(folder, model):
    engine, prompt = cca_engine(folder), make_prompt(101)
    engine.add(make_request("r", prompt, replace(PARAMS, n=3, temperature=1.0, seed=1, max_tokens=40)))
    ids, logprobs = defaultdict(list), defaultdict(list)
    for delta in run(engine):
        ids[delta.index] += delta.token_ids
        logprobs[delta.index] += delta.logprobs
    assert engine.stats().num_pages_used == 0
    assert len({tuple(own) for own in ids.values()}) == 3
    for index in range(3):
        wanted = model.logits(prompt + ids[index][:-1], SPEC)[len(prompt) - 1 :].log_softmax(-1)
        got = torch.tensor([entry.logprob for entry in logprobs[index]])
        torch.testing.assert_close(got, wanted.gather(1, torch.tensor(ids[index])[:, None])[:, 0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_steps", [1, 3, 9, 40])
def test_cancelled_sequences_give_every_page_back(folder, num_steps):
    engine = cca_engine(folder)
    params = SamplingParams(temperature=1.0, n=2, max_tokens=100, ignore_eos=True)
    for i in range(3):
        engine.add(make_request(str(i), make_prompt(100 + i), params))
    for _ in range(num_steps):
        engine.step()
    for i in range(3):
        engine.cancel(str(i))
    check_pages(engine)
    assert engine.stats().num_pages_used == 0


def num_held(engine):
    return engine.stats().num_pages_used * engine.pool.layout.page_size


def test_pages_follow_the_window(folder):
    """L / g + s + g - 1 entries at every token, both rounded up to pages; a chunk more while a prompt is computed."""
    spec, size = CCASpec(4, 40), 16
    engine = cca_engine(folder, spec, max_context=1024)
    engine.add(make_request("r", make_prompt(600), SamplingParams(max_tokens=300, temperature=0.0, ignore_eos=True)))
    sequence = engine._requests["r"].sequences[0]
    while engine.has_work:
        engine.step()
        num_cores = -(-sequence.num_computed // spec.group_size)
        most = num_cores + spec.window + spec.group_size - 1 + 3 * size  # of cores one page, of tokens two
        if sequence.row < 0 and sequence.pages:
            most = 600 // spec.group_size + spec.window + spec.group_size + 3 * size + SMALL["max_batch_tokens"]
        assert num_held(engine) <= most
    assert engine.stats().num_pages_used == 0


def test_entries_of_a_long_sequence_are_cores_and_window(tmp_path):
    """Within 1 % of L / g + s."""
    folder = make_checkpoint(tmp_path, "llama", max_position_embeddings=32768, num_hidden_layers=1)
    spec, length = CCASpec(8, 64), 32000
    engine = cca_engine(folder, spec, kv_bytes="2MiB", max_batch_tokens=2048)
    entries = engine.pool.num_pages * engine.pool.layout.page_size
    assert entries < length / 3.5  # a pool of far fewer entries than tokens
    assert engine.max_context == 32768
    engine.add(make_request("r", make_prompt(length), SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)))
    while not engine._rows.sequences:
        engine.step()
    assert length // 8 + 64 <= num_held(engine) <= 1.01 * (length / 8 + 64)
    run(engine)


def test_a_context_that_does_not_fit_is_refused_by_the_sizes_of_the_request(folder):
    engine = cca_engine(folder, CCASpec(8, 32), num_pages=12)
    assert 192 < engine.max_context < 1024
    prompt = make_prompt(engine.max_context - 1)
    engine.check(make_request("r", prompt, PARAMS))
    with pytest.raises(RequestError, match="do not fit the KV budget"):
        engine.check(make_request("r", prompt, with_sizes(2, 32)))
    generate(engine, [make_request("r", make_prompt(engine.max_context - 20), PARAMS)])


def test_nothing_is_shared(folder):
    engine = cca_engine(folder)
    for i in range(2):
        engine.add(make_request(str(i), make_prompt(100), PARAMS))
        deltas = run(engine)
        assert {delta.num_cached_tokens for delta in deltas} == {0}
    assert engine.stats().num_pages_cached == 0


@pytest.mark.parametrize("sizes", [(9, 8), (16, 8), (None, 4), (10, None)])
def test_windows_smaller_than_groups_are_refused(folder, sizes):
    with pytest.raises(RequestError, match=r"attention\.window=\d+ is not allowed with attention\.group_size=\d+"):
        cca_engine(folder).check(make_request("r", [1], with_sizes(*sizes)))


def test_requests_to_dense_engines_take_no_sizes(folder):
    with pytest.raises(RequestError, match="attention is not allowed"):
        make_engine(folder).check(make_request("r", [1], with_sizes(4, 8)))


def test_a_text_is_scored(folder, model):
    """Alone in the engine, in chunks that split groups; what is computed for others is not disturbed."""
    text = make_prompt(150)
    config = EngineConfig(num_threads=1, kv_bytes="4MiB", **SMALL)
    method = AttentionConfig(name="cca", group_size=SPEC.group_size, window=SPEC.window)
    with LLM(model_config=ModelConfig(path=str(folder)), engine_config=config, attention_config=method) as llm:
        progress = []
        scores = torch.tensor(llm.score(text, on_progress=lambda done, total: progress.append((done, total))))
        assert llm.engine.stats().num_pages_used == 0
        llm.engine.add(make_request("other", make_prompt(40)))
        with pytest.raises(QueueFullError, match="scored alone"):
            llm.score(text)
    wanted = model.logits(text, SPEC)[:-1].log_softmax(-1).gather(1, torch.tensor(text[1:])[:, None])[:, 0]
    torch.testing.assert_close(scores, wanted, atol=TOLERANCE, rtol=TOLERANCE)
    assert progress[-1] == (149, 149) and len(progress) > 3
