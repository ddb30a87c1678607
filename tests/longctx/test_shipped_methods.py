"""The demo models with landmark and CCA attention: whole, small, and served as they were trained."""

import random

import pytest

from longctx.llm import LLM
from longctx.messages import SamplingParams
from longctx.models import demo_data
from longctx.models.attention_spec import CCASpec, LandmarkSpec
from longctx.models.checkpoint import SHIPPED, inspect_checkpoint

SPECS = {"demo_landmark": LandmarkSpec, "demo_cca": CCASpec}
ANSWER = SamplingParams(temperature=0.0, max_tokens=30)


@pytest.mark.parametrize("name", SHIPPED)
def test_is_whole_and_small(name):
    spec = inspect_checkpoint(name)
    assert spec.name == name and spec.dtype == "bfloat16"
    assert isinstance(spec.attention, SPECS.get(name, type(None)))
    assert {path.name for path in spec.path.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert sum(path.stat().st_size for path in spec.path.iterdir()) <= 10e6


def ask(llm, num_tokens, depth, seed):
    """The pass key in a document of held-out files, and the answer."""
    rng = random.Random(seed)
    _, held_out = demo_data.load_corpora()
    fact = demo_data.make_pass_key(rng)
    text = held_out.draw_lines(rng, num_tokens - 100) if num_tokens < 60_000 else held_out.text[: num_tokens - 100]
    document = "".join(span.text for span in demo_data.hide(text, [fact], [depth], rng))
    output = llm.chat([{"role": "user", "content": f"{document}\n\n{fact.question}"}], ANSWER)
    return fact.value, output.outputs[0].text


def test_landmarks_find_a_key_far_beyond_the_trained_length():
    with LLM("demo_landmark") as llm:
        assert llm.engine.max_context > 500_000
        answers = [ask(llm, 8192, depth, seed) for seed, depth in enumerate((0.1, 0.5, 0.8))]
    assert sum(key in answer for key, answer in answers) >= 2


@pytest.mark.slow
def test_a_document_of_128k_tokens_is_answered():
    """The card says how often rightly."""
    with LLM("demo_landmark") as llm:
        _, answer = ask(llm, 131_072, 0.6, 0)
    assert "is" in answer and any(character.isdigit() for character in answer)


def test_cores_continue_text():
    with LLM("demo_cca") as llm:
        assert "cca" in llm.engine.stats().attention
        assert "import" in llm.generate("import os\nimport sys\n", ANSWER)[0].outputs[0].text
