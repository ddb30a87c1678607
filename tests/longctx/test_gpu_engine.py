"""The engine's tests on a GPU: the same files, in processes of their own whose engines are there."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longctx.engine.config import EngineConfig
from longctx.llm import LLM
from longctx.messages import SamplingParams
from longctx.models.config import ModelConfig
from longctx.models.demo_data import load_corpora
from longctx.models.train_demo import make_prompt
from tests.longctx.engines import generate, make_engine, make_request
from tests.longctx.test_engine import random_prompt
from tests.tiny_checkpoints import make_checkpoint

pytestmark = pytest.mark.gpu

FILES = (
    "test_engine.py",
    "test_engines_apart.py",
    "test_resumed_requests.py",
    "methods/test_cca_engine.py",
    "methods/test_core_fetch.py",
    "methods/test_landmark_inference.py",
    "test_shipped_methods.py",
)


@pytest.fixture(autouse=True)
def _needs_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")


@pytest.mark.parametrize("name", FILES)
def test_the_same_tests_pass_there(name):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/longctx/{name}"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"LONGCTX_TEST_DEVICE": "cuda"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_graphs_change_nothing(tmp_path, monkeypatch, family):
    """Batches of several lengths, prompts in chunks beside decoding sequences, sliding windows."""
    monkeypatch.setattr("tests.longctx.engines.DEVICE", "cuda")
    folder, found = make_checkpoint(tmp_path / family, family), []
    for has_graphs in (True, False):
        engine = make_engine(folder, cuda_graphs=has_graphs, max_batch_tokens=64)
        assert engine.stats().attention == "triton"
        assert (engine.runner.graphs is not None) == has_graphs
        requests = [make_request(str(i), random_prompt(i, n)) for i, n in enumerate((5, 64, 37, 130, 1, 90))]
        found.append(generate(engine, requests))
    assert found[0] == found[1]


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_the_demo_model_finds_a_key_in_bfloat16(cuda_graphs):
    """Through torch's flash kernel; four prompts of different lengths, in chunks, decoded together."""
    held_out = load_corpora()[1]
    pairs = [
        make_prompt(held_out, random.Random(seed), num_tokens=512 + 100 * seed, depth=0.5, chat=False)
        for seed in range(4)
    ]
    config = EngineConfig(cuda_graphs=cuda_graphs, max_batch_tokens=256, max_sequences=8, kv_bytes="64MiB")
    with LLM(model_config=ModelConfig("demo", device="cuda"), engine_config=config) as llm:
        assert llm.engine.stats().attention == "torch_flash"
        outputs = llm.generate([prompt for prompt, _ in pairs], SamplingParams(temperature=0.0, max_tokens=8))
    keys = ["".join(filter(str.isdigit, answer)) for _, answer in pairs]
    assert sum(key in output.outputs[0].text for key, output in zip(keys, outputs, strict=True)) >= 3
