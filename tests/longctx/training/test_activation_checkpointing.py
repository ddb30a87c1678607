"""Checkpointed layers give the same gradients from less memory; over ranks, without a second exchange."""

import gc
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import parallel.attention
from longctx.training.activation_checkpointing import checkpoint_layers
from longctx.training.activation_store import FileStore
from longctx.training.config import TrainLoopConfig
from longctx.training.memory_saving import save_memory
from longctx.training.sequence_parallel import SequenceParallel
from parallel.kept_attention import KeptAttention
from tests.longctx.test_sequence_parallel_training import BOUNDS, TOLERANCE, gradients_of, make_batch, run_alone
from tests.longctx.training.live_memory import LiveMemory
from tests.parallel.gloo_ranks import run_ranks
from tests.tiny_checkpoints import make_checkpoint

CPU = torch.device("cpu")


def load(folder, dtype=torch.float64):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).train()


def adapt(model):
    """LoRA with dropout; everything else is frozen."""
    import peft  # takes seconds, which ranks need not spend

    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.2, init_lora_weights=False)
    torch.manual_seed(1)
    return peft.get_peft_model(model, config)


def differentiate(model, num_tokens=60):
    input_ids = torch.randint(0, 256, (1, num_tokens), generator=torch.Generator().manual_seed(5))
    torch.manual_seed(7)
    logits = model(input_ids=input_ids, use_cache=False).logits[0, :-1]
    torch.nn.functional.cross_entropy(logits, input_ids[0, 1:]).backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_gradients_are_those_of_the_model(tmp_path, adapted, offload):
    folder = make_checkpoint(tmp_path, "llama", tokenizer=False)
    model, plain = (adapt(load(folder)) if adapted else load(folder) for _ in range(2))
    checkpoint_layers(model, store=FileStore(tmp_path) if offload else None)
    found, expected = differentiate(model), differentiate(plain)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-14, msg=name)


def measure(folder, **choices) -> int:
    """Peak of live tensors over the first decoder's forward and backward, its gradients left out."""
    model = load(folder, torch.float32).requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_()
    save_memory(model, TrainLoopConfig(**choices), device=CPU, scratch=folder / "scratch")
    input_ids = torch.arange(256)[None]
    with LiveMemory() as memory:
        model.model(input_ids, use_cache=False).last_hidden_state.sum().backward()
    return memory.peak_bytes


def test_each_saves_memory(tmp_path):
    folder = make_checkpoint(tmp_path, "llama", tokenizer=False, num_hidden_layers=6)
    hidden_bytes = 256 * 64 * 4
    plain = measure(folder, activation_checkpointing=False)
    inputs_kept = measure(folder)
    offloaded = measure(folder, activation_offload=True)
    tiled = measure(folder, activation_offload=True, mlp_tile=64)
    assert inputs_kept < 0.5 * plain
    assert offloaded < inputs_kept - 4 * hidden_bytes
    assert tiled < offloaded


def test_generation_runs_as_before(tmp_path):
    folder = make_checkpoint(tmp_path, "llama", tokenizer=False)
    model, prompt = load(folder), torch.arange(9)[None]
    expected = model.generate(prompt, max_new_tokens=5, do_sample=False)
    save_memory(model, TrainLoopConfig(mlp_tile=4), device=CPU, scratch=tmp_path)
    assert torch.equal(model.generate(prompt, max_new_tokens=5, do_sample=False), expected)


def count_exchanges(rank, world_size, scratch, folder, cases):
    """Largest relative distance of loss and gradients over two steps, and forward exchanges, of each case."""
    calls, real = [], parallel.attention.Forward
    parallel.attention.Forward = lambda *arguments, **named: (calls.append(1), real(*arguments, **named))[1]
    torch.manual_seed(rank)
    expected_loss, expected = run_alone(folder)
    results = []
    for plan, choices, _ in cases:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
        save_memory(model, TrainLoopConfig(**choices), device=CPU, scratch=Path(scratch))
        shared = SequenceParallel(model, plan=plan)
        input_ids, labels = make_batch()
        errors = []
        calls.clear()
        for _ in range(2):
            model.zero_grad()
            mean, share = shared.loss(input_ids, labels=labels, cu_seqlens=BOUNDS)
            share.backward()
            shared.reduce_gradients()
            errors.append(abs(mean.item() - expected_loss) / expected_loss)
            for name, found in gradients_of(model).items():
                errors.append(((found - expected[name]).norm() / expected[name].norm()).item())
        results.append((max(errors), len(calls)))
    return results


def test_ranks_exchange_attention_once(tmp_path):
    folder = make_checkpoint(tmp_path, "llama", tokenizer=False)
    cases = [
        ("all_gather", {}, 1),  # a plan that keeps what arrives, if nothing is checkpointed
        ("token_ring", {"mlp_tile": 20}, 1),
        ("auto", {"mlp_tile": 50, "activation_offload": True}, 1),
        ("all_gather", {"keep_attention": False}, 2),
    ]
    for results in run_ranks(count_exchanges, 2, str(folder), cases):
        for (error, num_exchanges), (_, _, expected) in zip(results, cases, strict=True):
            assert error < TOLERANCE
            assert num_exchanges == expected * 2 * 2  # layers, steps


def count_kept(rank, world_size, scratch, folder):
    """Tensors in the file whenever a layer takes its attention back, over two steps; and after them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).train()
    store = FileStore(Path(scratch))
    checkpoint_layers(model, store=store)
    shared = SequenceParallel(model)
    counts, take = [], KeptAttention.take
    KeptAttention.take = lambda kept: (counts.append(store._num_used), take(kept))[1]
    gc.disable()  # nothing may wait for it
    for _ in range(2):
        _, share = shared.loss(make_batch()[0], cu_seqlens=BOUNDS)
        share.backward()
        del share
    return counts, store._num_used


def test_what_is_kept_goes_as_it_is_used(tmp_path):
    folder = make_checkpoint(tmp_path, "llama", tokenizer=False, num_hidden_layers=3)
    assert run_ranks(count_kept, 1, str(folder)) == [([6, 4, 2] * 2, 0)]
