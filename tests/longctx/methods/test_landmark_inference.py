"""Landmark attention in the engine: a cached, chunked, batched computation equals the formulas, at every length."""

from dataclasses import replace

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

from longctx.attention.config import AttentionConfig
from longctx.engine.build import build_engine
from longctx.engine.config import EngineConfig
from longctx.errors import ConfigError, RequestError
from longctx.llm import LLM
from longctx.models.config import ModelConfig
from memory.layout import MIN_CACHE
from tests.longctx.engines import COMPILED, DEVICE, GREEDY, collect, make_request, run
from tests.longctx.methods.landmark_inference import infer
from tests.tiny_checkpoints import make_checkpoint

BLOCK, TOP_K, LANDMARK = 16, 2, 258
METHOD = {"name": "landmark", "block_size": BLOCK, "landmark_token_id": LANDMARK}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("landmark")
    return {
        family: make_checkpoint(root / family, family, longctx_attention=METHOD)
        for family in ("llama", "qwen3", "phi3")
    }


def make_engine(folder, *, implementation="auto", dtype="float32", options=None, **engine_options):
    return build_engine(
        ModelConfig(path=str(folder), device=DEVICE, attention=implementation, dtype=dtype),
        EngineConfig(**({"num_threads": 1, "kv_bytes": "4MiB"} | engine_options)),
        attention=AttentionConfig(top_k=TOP_K, **(options or {})),
    )


def make_prompt(seed, length):
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def reference_logits(folder, token_ids):
    """Of every text token, by transformers' model around the formulas, in float64."""
    ids, is_landmark = [], []
    for idx, token_id in enumerate(token_ids):
        ids.append(token_id)
        is_landmark.append(False)
        if idx % BLOCK == BLOCK - 1:
            ids.append(LANDMARK)
            is_landmark.append(True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    is_landmark, base = torch.tensor(is_landmark), model.config.rope_parameters["rope_theta"]

    def rotate(x, positions):
        half = x.shape[-1] // 2
        angles = positions[:, None] * base ** (-torch.arange(half, dtype=torch.float64) / half)
        low, high = x[..., :half], x[..., half:]
        return torch.cat((low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()), -1)

    def attend(module, query, key, value, mask, scaling, **_):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        text, landmarks = infer(
            q[~is_landmark], k[~is_landmark], v[~is_landmark], (q[is_landmark], k[is_landmark]),
            block_size=BLOCK, top_k=TOP_K, rotate=rotate, scale=scaling,
        )  # fmt: skip
        out = torch.empty_like(q)
        out[~is_landmark], out[is_landmark] = text, landmarks
        return out[None], None

    AttentionInterface.register("landmark_reference", attend)
    AttentionMaskInterface.register("landmark_reference", lambda *_, **__: None)
    model.set_attn_implementation("landmark_reference")

    def turn_nothing(hidden, position_ids):
        ones = torch.ones(*position_ids.shape, module_dim, dtype=hidden.dtype)
        return ones, torch.zeros_like(ones)

    module_dim = 2 * model.model.rotary_emb.inv_freq.shape[0]
    model.model.rotary_emb.forward = turn_nothing
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, ~is_landmark]


def error(actual, expected):
    """The largest, relative to the largest logit; the landmark has none."""
    actual, text = actual.to(expected), torch.arange(expected.shape[1], device=expected.device) != LANDMARK
    return ((actual - expected).abs().amax(0) / expected.abs().max())[text].max()


def record_logits(engine):
    """A list that gets every step's logits."""
    steps, compute = [], engine.decoder.logits

    def recorded(hidden_RC):
        logits = compute(hidden_RC)
        steps.append(logits.clone())
        return logits

    engine.decoder.logits = recorded
    return steps


@pytest.mark.parametrize(
    ("family", "implementation", "chunk"),
    [("llama", COMPILED, 2048), ("llama", "torch", 16), ("qwen3", COMPILED, 16), ("phi3", COMPILED, 48)],
)
def test_decoding_equals_the_formulas_at_every_length(folders, family, implementation, chunk):
    """A prompt of four blocks and a bit, then more than two blocks of tokens, each computed by itself."""
    engine = make_engine(folders[family], implementation=implementation, max_batch_tokens=chunk)
    steps, prompt = record_logits(engine), make_prompt(0, 4 * BLOCK + 3)
    engine.add(make_request("r", prompt, replace(GREEDY, max_tokens=2 * BLOCK + 5)))
    token_ids = prompt + collect(run(engine))["r", 0]
    expected = reference_logits(folders[family], token_ids)[len(prompt) - 1 : -1]
    actual = torch.cat([logits for logits in steps if len(logits)]).double()
    assert actual.shape == expected.shape
    assert error(actual, expected) < 1e-4


@pytest.mark.parametrize("length", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK - 1, 3 * BLOCK])
def test_prompts_that_end_at_the_borders_of_blocks(folders, length):
    engine = make_engine(folders["llama"])
    steps, prompt = record_logits(engine), make_prompt(1, length)
    engine.add(make_request("r", prompt, replace(GREEDY, max_tokens=3)))
    token_ids = prompt + collect(run(engine))["r", 0]
    expected = reference_logits(folders["llama"], token_ids)[length - 1 : -1]
    assert error(torch.cat(steps).double(), expected) < 1e-4


@pytest.mark.parametrize("retrieval", ["head_token", "token"])
def test_a_batch_equals_each_alone(folders, retrieval):
    """Sequences of different lengths, one of them cut into steps, another that finds its prefix; pages come back."""
    prompts = [make_prompt(2, 150), make_prompt(3, 33), make_prompt(4, 15), [*make_prompt(2, 130), 7]]
    alone = []
    for prompt in prompts:
        engine = make_engine(folders["llama"], options={"retrieval": retrieval}, prefix_cache=False)
        engine.add(make_request("r", prompt))
        alone.append(collect(run(engine))["r", 0])
    engine = make_engine(folders["llama"], options={"retrieval": retrieval}, max_batch_tokens=64)
    for idx, prompt in enumerate(prompts):
        engine.add(make_request(str(idx), prompt))
    together = collect(run(engine))
    assert [together[str(idx), 0] for idx in range(len(prompts))] == alone
    engine.add(make_request("again", prompts[0]))
    assert collect(run(engine))["again", 0] == alone[0]
    assert engine.stats().num_cached_tokens >= 9 * BLOCK
    assert engine.stats().num_pages_used == 0


@pytest.mark.parametrize("blocks", ["host", "file"])
def test_tiers_change_nothing(folders, blocks, tmp_path):
    """Near memory for 16 blocks: more are looked at than fit, forks copy what is being filled, a prefix is found."""
    prompts = [make_prompt(8, 900), make_prompt(9, 333), make_prompt(10, 20)]
    params = [replace(GREEDY, n=1 + (idx == 1)) for idx in range(3)]
    texts = []
    for tiers in ({}, {"blocks": blocks, "blocks_bytes": "4MiB", "blocks_folder": str(tmp_path)}):
        options = {"max_batch_tokens": 128, "max_sequences": 4}
        if tiers:
            options["kv_bytes"] = str((128 // BLOCK + 8 + MIN_CACHE) * 8448)
        engine = make_engine(folders["llama"], options=tiers, **options)
        for idx, prompt in enumerate(prompts):
            engine.add(make_request(str(idx), prompt, params[idx]))
        first = collect(run(engine))
        engine.add(make_request("again", prompts[0]))
        texts.append((first, collect(run(engine))))
        assert engine.stats().num_cached_tokens >= 50 * BLOCK
    assert texts[0] == texts[1]
    pages = engine.pool
    assert pages.num_fetched > 0
    assert pages.num_hits > 0
    assert len(pages._free_frames) == pages._num_staging - len(pages._filled)
    with pytest.raises(ConfigError, match="32 pages of 8448 bytes have to be near"):
        make_engine(folders["llama"], options=tiers, **(options | {"kv_bytes": str(31 * 8448)}))


def test_forks_and_preemption(folders):
    prompts = [make_prompt(seed, 100) for seed in range(3)]
    params = replace(GREEDY, max_tokens=60)
    expected = []
    for prompt in prompts:
        engine = make_engine(folders["llama"])
        engine.add(make_request("r", prompt, params))
        expected.append(collect(run(engine))["r", 0])
    page_bytes = engine.pool.layout.page_bytes
    engine = make_engine(folders["llama"], kv_bytes=str(24 * page_bytes), prefix_cache=False)
    for idx, prompt in enumerate(prompts):
        engine.add(make_request(str(idx), prompt, replace(params, n=1 + (idx == 0))))
    together = collect(run(engine))
    assert [together[str(idx), 0] for idx in range(3)] == expected
    assert together["0", 1] == expected[0]
    assert engine.stats().num_preemptions > 0


def test_bfloat16_is_near_float32(folders):
    steps = []
    for dtype in ("float32", "bfloat16"):
        engine = make_engine(folders["llama"], dtype=dtype)
        steps.append(record_logits(engine))
        engine.add(make_request("r", make_prompt(5, 3 * BLOCK), replace(GREEDY, max_tokens=1)))
        run(engine)
    assert error(steps[1][0], steps[0][0]) < 0.1


def test_everything_is_retrieved_if_nothing_is_skipped(folders):
    """A share of 1 leaves every token with its own block."""
    logits = {}
    for skip_below in (0.0, 1e-30, 1.0):
        engine = make_engine(folders["llama"], options={"skip_below": skip_below})
        steps = record_logits(engine)
        engine.add(make_request("r", make_prompt(6, 3 * BLOCK + 4), replace(GREEDY, max_tokens=1)))
        run(engine)
        logits[skip_below] = steps[0]
    assert torch.equal(logits[0.0], logits[1e-30])
    assert not torch.allclose(logits[0.0], logits[1.0], atol=0.1)


def test_the_landmark_is_never_generated_nor_taken_from_a_prompt(folders):
    engine = make_engine(folders["llama"])
    steps = record_logits(engine)
    engine.add(make_request("r", make_prompt(7, 20)))
    run(engine)
    assert all((logits[:, LANDMARK] == float("-inf")).all() for logits in steps)
    with pytest.raises(RequestError, match="prompt token id 258 at position 2 is not allowed: it is the landmark"):
        engine.add(make_request("bad", [1, 2, LANDMARK]))


@pytest.mark.parametrize("blocks", ["near", "file"])
def test_a_text_is_scored_with_landmarks(folders, blocks):
    text = make_prompt(11, 5 * BLOCK + 7)
    model, engine = (
        ModelConfig(path=str(folders["llama"]), device=DEVICE),
        EngineConfig(num_threads=1, kv_bytes="4MiB", max_batch_tokens=32, max_sequences=4),
    )
    attention = AttentionConfig(top_k=TOP_K, blocks=blocks, blocks_bytes="4MiB" if blocks == "file" else "auto")
    with LLM(model_config=model, engine_config=engine, attention_config=attention) as llm:
        scores = torch.tensor(llm.score(text), dtype=torch.float64)
        assert llm.engine.stats().num_pages_used == 0
    logits = reference_logits(folders["llama"], text)
    logits[:, LANDMARK] = float("-inf")
    expected = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(text[1:])[:, None])[:, 0]
    assert (scores - expected).abs().max() < 1e-3


def test_refusals(folders, tmp_path):
    with pytest.raises(ConfigError, match=r"attention.top_k=59 is not allowed: at most 58"):
        build_engine(ModelConfig(path=str(folders["llama"])), EngineConfig(), attention=AttentionConfig(top_k=59))
    with pytest.raises(ConfigError, match=r"attention.name=dense is not allowed: .* landmark"):
        build_engine(ModelConfig(path=str(folders["llama"])), EngineConfig(), attention=AttentionConfig(name="dense"))
    with pytest.raises(ConfigError, match=r"engine.page_size=32 is not allowed: .* 16 tokens"):
        make_engine(folders["llama"], page_size=32)
    windows = make_checkpoint(tmp_path / "windows", "mistral", longctx_attention=METHOD)
    with pytest.raises(ConfigError, match="sliding windows"):
        make_engine(windows)
