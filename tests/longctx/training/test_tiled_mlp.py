"""Tiled MLPs give what MLPs give, forward and backward, with adapters and dropout, and hold a tile's activations."""

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from longctx.errors import ConfigError
from longctx.training.tiled_mlp import tile_mlps
from tests.longctx.training.live_memory import LiveMemory
from tests.tiny_checkpoints import make_checkpoint

NUM_TOKENS = 61


def load(folder, dtype=torch.float64):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).train()


def adapt(model, dropout=0.0):
    """LoRA on every linear layer, with matrices that are not zero."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "gate_proj", "down_proj"], lora_dropout=dropout)
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(2)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = 0.1 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return model


def differentiate(model):
    """Loss and gradients; random numbers are the same in every call."""
    generator = torch.Generator().manual_seed(5)
    input_ids = torch.randint(0, 256, (1, NUM_TOKENS), generator=generator)
    torch.manual_seed(7)
    logits = model(input_ids=input_ids).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, input_ids[0, 1:])
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    return loss, dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


def assert_equal(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-10)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma"])
@pytest.mark.parametrize("tile", [1, 16, 1000])
def test_loss_and_gradients_are_those_of_the_model(tmp_path, family, tile):
    folder = make_checkpoint(tmp_path, family, tokenizer=False)
    model = load(folder)
    tile_mlps(model, tile=tile)
    assert_equal(differentiate(model), differentiate(load(folder)))


def test_adapters_are_trained_through_tiles(tmp_path):
    folder = make_checkpoint(tmp_path, "llama", tokenizer=False)
    model = adapt(load(folder))
    assert len(tile_mlps(model, tile=16)) == 2
    found = differentiate(model)
    assert any("mlp.gate_proj.lora_A" in name for name in found[1])
    assert_equal(found, differentiate(adapt(load(folder))))


def test_the_backward_drops_what_the_forward_dropped(tmp_path):
    model = adapt(load(make_checkpoint(tmp_path, "llama", tokenizer=False)), dropout=0.3)
    tile_mlps(model, tile=16)
    mlp = model.get_decoder().layers[1].mlp
    weight, step = mlp.down_proj.lora_B["default"].weight, 1e-5
    hidden = torch.randn(1, NUM_TOKENS, 64, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def run(change):
        torch.manual_seed(7)
        weight.data[3, 2] += change
        return (mlp(hidden) * hidden).sum()

    (gradient,) = torch.autograd.grad(run(0), [weight])
    above, below = run(step), run(-2 * step)
    torch.testing.assert_close(gradient[3, 2], (above - below) / (2 * step), rtol=1e-7, atol=1e-9)


def test_a_gradient_reaches_a_weight_once_a_backward(tmp_path):
    model = load(make_checkpoint(tmp_path, "llama", tokenizer=False))
    tile_mlps(model, tile=4)
    calls = []
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.register_post_accumulate_grad_hook(lambda _: calls.append(1))
    input_ids = torch.arange(NUM_TOKENS)[None]
    for _ in range(2):
        model(input_ids, labels=input_ids).loss.backward()
    assert len(calls) == 2


def test_wide_activations_exist_for_one_tile(tmp_path):
    folder = make_checkpoint(tmp_path, "llama", tokenizer=False, intermediate_size=2048, num_hidden_layers=1)
    peaks = []
    for tile in (0, 8):
        model = load(folder, torch.float32)
        for name, weight in model.named_parameters():
            weight.requires_grad_("embed" in name)
        if tile:
            tile_mlps(model, tile=tile)
        input_ids = torch.arange(256)[None]
        with LiveMemory() as memory:
            model.model(input_ids).last_hidden_state.sum().backward()
        peaks.append(memory.peak_bytes)
    assert peaks[0] > 3 * 256 * 2048 * 4
    assert peaks[1] < 0.3 * peaks[0]


def test_a_model_without_mlps_is_refused(tmp_path):
    model = load(make_checkpoint(tmp_path, "llama", tokenizer=False))
    del model.model.layers[1].mlp
    with pytest.raises(ConfigError, match=r"train\.mlp_tile=8 is not allowed: layer 1 of this model has no mlp"):
        tile_mlps(model, tile=8)
