"""Adapters under ZeRO-3 that keeps no weight whole: what is saved is what was trained."""

import os

import pytest
import torch

from longctx.adapters.adapter import adapter_state, add_adapter, load_adapter, save_adapter
from longctx.training.config import DeepSpeedConfig, OptimizerConfig
from longctx.training.deepspeed_engine import DeepSpeedTraining
from tests.longctx.adapters.adapted_models import INPUT_IDS, METHODS, load_base, logits_of, make_config
from tests.parallel.gloo_ranks import run_ranks
from tests.tiny_checkpoints import make_checkpoint


def train(rank, world_size, folder, base):
    """For each method the loss before and after, and how far the saved adapter's logits are from those trained."""
    os.environ["LOCAL_RANK"] = str(rank)  # DeepSpeed wants it
    results = {}
    for method in METHODS:
        torch.manual_seed(0)
        model = add_adapter(load_base(base), make_config(method, train_norms=True, train_embeddings=True)).train()
        engine = DeepSpeedTraining(
            model,
            dict(model.named_parameters()),
            config=DeepSpeedConfig(zero_stage=3, persistence_threshold=0),
            optimizer=OptimizerConfig(),
            dtype=torch.float32,
            num_micro_steps=1,
        )
        assert not any(parameter.numel() for parameter in model.parameters())
        losses = []
        for _ in range(3):
            loss = engine(INPUT_IDS, labels=INPUT_IDS, use_cache=False).loss
            losses.append(loss.item())
            engine.backward(loss / world_size)
            engine.step(1e-2)
        state = adapter_state(model, engine.gather)
        engine.train(False)
        trained = logits_of(engine)
        if rank == 0:
            save_adapter(state, model, f"{folder}/{method}")
            saved = logits_of(load_adapter(load_base(base), f"{folder}/{method}").eval())
            results[method] = losses, (saved - trained).abs().max().item(), min(x.numel() for x in state.values())
        engine.destroy()
    return results


@pytest.mark.slow
def test_what_is_saved_is_what_was_trained(tmp_path):
    results, _ = run_ranks(train, 2, make_checkpoint(tmp_path, "qwen3"))
    assert sorted(results) == sorted(METHODS)
    for losses, distance, least in results.values():
        assert losses[-1] < losses[0] - 0.5
        assert distance < 1e-5
        assert least > 0
