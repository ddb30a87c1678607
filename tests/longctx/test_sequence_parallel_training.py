"""A model whose sequences several ranks share has the loss and the gradients of one rank without any of it."""

from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

from longctx.training.sequence_parallel import IGNORED, SequenceParallel
from tests.parallel.gloo_ranks import run_ranks
from tests.tiny_checkpoints import make_checkpoint

BOUNDS = (0, 90, 91, 150, 211)
TOLERANCE = 1e-5
# Two of the documents are longer than it was made for, and get frequencies by their lengths.
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
FAMILIES = {"dynamic": {"family": "llama", "max_position_embeddings": 60, "rope_parameters": DYNAMIC}}


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, and labels of which some do not count."""
    generator = torch.Generator().manual_seed(3)
    input_ids = torch.randint(0, 256, (1, BOUNDS[-1]), generator=generator)
    labels = input_ids.clone()
    labels[0, 20:33] = IGNORED
    return input_ids, labels


def load(folder: str):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def run_alone(folder: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Each document by itself, with transformers alone."""
    model, (input_ids, labels) = load(folder), make_batch()
    total, count = torch.zeros(()), 0
    for start, stop in pairwise(BOUNDS):
        logits = model(input_ids[:, start:stop]).logits[0, :-1]
        targets = labels[0, start + 1 : stop]
        total = total + torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        count += int((targets != IGNORED).sum())
    (total / count).backward()
    return (total / count).item(), gradients_of(model)


def gradients_of(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def check(rank, world_size, _, folder, layout, plan, checkpointing):
    """Largest relative distances of loss and gradients."""
    torch.manual_seed(rank)
    expected_loss, expected = run_alone(folder)
    model = load(folder).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    parallel = SequenceParallel(model, layout=layout, plan=plan)
    input_ids, labels = make_batch()
    mean, share = parallel.loss(input_ids, labels=labels, cu_seqlens=BOUNDS)
    share.backward()
    parallel.reduce_gradients()
    errors = [
        ((found - expected[name]).norm() / expected[name].norm()).item() for name, found in gradients_of(model).items()
    ]
    return abs(mean.item() - expected_loss) / expected_loss, max(errors)


@pytest.mark.parametrize(
    ("family", "world_size", "layout", "plan", "checkpointing"),
    [
        ("llama", 1, "balanced", "auto", False),
        ("llama", 2, "balanced", "token_ring", False),
        pytest.param("llama", 3, "zigzag", "kv_ring", True, marks=pytest.mark.slow),
        pytest.param("mistral", 3, "striped", "auto", False, marks=pytest.mark.slow),
        pytest.param("qwen3", 2, "contiguous", "ulysses", True, marks=pytest.mark.slow),
        ("dynamic", 2, "balanced", "auto", True),
    ],
)
def test_loss_and_gradients_are_those_of_one_rank(tmp_path, family, world_size, layout, plan, checkpointing):
    folder = make_checkpoint(tmp_path, **FAMILIES.get(family, {"family": family}))
    for loss_error, gradient_error in run_ranks(check, world_size, str(folder), layout, plan, checkpointing):
        assert loss_error < TOLERANCE
        assert gradient_error < TOLERANCE


def refuse(rank, world_size, _, folder):
    model = load(folder)
    parallel = SequenceParallel(model)
    input_ids, labels = make_batch()
    for arguments, words in (
        ({"input_ids": input_ids[0]}, r"\[1, num_tokens\]"),
        ({"input_ids": input_ids, "labels": labels[:, :-1]}, "labels of shape"),
        ({"input_ids": input_ids, "labels": torch.full_like(labels, IGNORED)}, "no token counts"),
        ({"input_ids": input_ids, "cu_seqlens": [0, 5]}, "rises from 0"),
    ):
        with pytest.raises(ValueError, match=words):
            parallel.loss(**arguments)
    with pytest.raises(ValueError, match="layout 'zig' is unknown"):
        SequenceParallel(model, layout="zig")
    model.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match="is not allowed: 0"):
        SequenceParallel(model)
    return True


def test_mistakes_are_named(tmp_path):
    assert run_ranks(refuse, 1, str(make_checkpoint(tmp_path, "llama"))) == [True]
