"""``LLM.score``: log probabilities of a given text, against transformers' logits of the whole text."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from longctx import LLM
from longctx.engine import scoring
from longctx.engine.config import EngineConfig
from longctx.errors import RequestError
from longctx.models.config import ModelConfig
from tests.longctx.engines import GREEDY
from tests.tiny_checkpoints import make_checkpoint

NUM_TOKENS = 203
LONG_FACTORS = {"short_factor": [1.0 + i / 10 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, **LONG_FACTORS}
CASES = {
    "llama": ("llama", {}),
    "mistral_window": ("mistral", {}),
    "qwen3_tied": ("qwen3", {}),
    "gemma": ("gemma", {}),
    "phi3_longrope": ("phi3", {"original_max_position_embeddings": 112, "rope_parameters": LONG_ROPE}),
}


def make_ids(seed=0, num_tokens=NUM_TOKENS):
    return torch.randint(0, 256, (num_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def score_reference(folder, ids):
    """float64 log-softmax of transformers' logits, the token that follows gathered."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    return logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)


def make_llm(folder, *, attention="torch", **options):
    engine = EngineConfig(**({"kv_bytes": "4MiB", "num_threads": 1, "max_batch_tokens": 64} | options))
    return LLM(str(folder), model_config=ModelConfig(attention=attention), engine_config=engine)


@pytest.mark.parametrize("attention", ["torch", "native"])
@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(tmp_path, monkeypatch, case, attention):
    family, config = CASES[case]
    folder, ids = make_checkpoint(tmp_path / case, family, **config), make_ids()
    monkeypatch.setattr(scoring, "SLICE_BYTES", 4 * 260 * 7)  # seven rows of logits at one time
    with make_llm(folder, attention=attention) as llm:
        scored = llm.score(ids)
    assert len(scored) == NUM_TOKENS - 1
    torch.testing.assert_close(torch.tensor(scored).double(), score_reference(folder, ids), atol=2e-4, rtol=2e-4)


def test_scoring_and_generating_share_the_pool(tmp_path):
    folder, ids = make_checkpoint(tmp_path / "llama", "llama"), make_ids()
    progress = []
    with make_llm(folder) as llm:
        free = llm.engine.cache.num_available
        first = llm.score(ids, on_progress=lambda *done: progress.append(done))
        text = llm.generate([ids], GREEDY)[0].outputs[0].token_ids
        assert llm.score(ids) == first
        assert llm.generate([ids], GREEDY)[0].outputs[0].token_ids == text
        assert llm.engine.cache.num_available == free
    assert progress == [(64, 202), (128, 202), (192, 202), (202, 202)]


def test_a_text_as_long_as_the_context_is_scored(tmp_path):
    folder = make_checkpoint(tmp_path / "llama", "llama", max_position_embeddings=256)
    with make_llm(folder) as llm:
        assert len(llm.score(make_ids(num_tokens=256))) == 255
        with pytest.raises(RequestError, match="the prompt has 256 tokens; the context is 256"):
            llm.score(make_ids(num_tokens=257))


@pytest.mark.parametrize(
    ("ids", "words"), [([1], "1 tokens cannot be scored"), ([1, 2, 999], "999"), ([999, 1], "999")]
)
def test_what_cannot_be_scored_is_named(tmp_path, ids, words):
    with make_llm(make_checkpoint(tmp_path / "llama", "llama")) as llm, pytest.raises(RequestError, match=words):
        llm.score(ids)


def test_outputs_come_in_turn(tmp_path):
    with make_llm(make_checkpoint(tmp_path / "llama", "llama"), max_waiting=2) as llm:
        prompts, progress = [make_ids(seed, 70 + seed) for seed in range(6)], []
        whole = [each.outputs for each in llm.generate(prompts, GREEDY)]
        outputs = llm.generate_in_turn(prompts, GREEDY, on_progress=lambda *done: progress.append(done))
        assert next(outputs).outputs == whole[0]
        outputs.close()
        assert llm.engine.stats().num_running == llm.engine.stats().num_waiting == 0
    assert (70, 70) in progress
