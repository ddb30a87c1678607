"""The output layer gives the loss where there are targets, logits where not, and refuses what it would get wrong."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from longctx.errors import ConfigError
from longctx.training.loss_head import LossHead
from longctx.training.tiled_loss import IGNORED
from tests.tiny_checkpoints import make_checkpoint

NUM_TOKENS = 50


def load(folder, **more):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **more)


def make_batch():
    generator = torch.Generator().manual_seed(5)
    input_ids = torch.randint(0, 256, (1, NUM_TOKENS), generator=generator)
    targets = input_ids.roll(-1, 1)
    targets[0, 10:20] = targets[0, -1] = IGNORED
    return input_ids, targets


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])  # the latter two with tied embeddings
def test_loss_and_gradients_are_those_of_transformers(tmp_path, family):
    folder = make_checkpoint(tmp_path, family, tokenizer=False)
    (input_ids, targets), num_targets = make_batch(), NUM_TOKENS - 11
    model, plain = load(folder), load(folder)
    logits = plain(input_ids).logits
    expected = torch.nn.functional.cross_entropy(logits[0], targets[0], ignore_index=IGNORED)
    expected.backward()
    head = LossHead(model, tile=8)
    loss = head.loss(model, targets, scale=1 / num_targets, input_ids=input_ids, use_cache=False)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-12, msg=name)
    torch.testing.assert_close(model(input_ids).logits, logits, rtol=0, atol=0)


def test_a_run_that_fails_leaves_no_targets_behind(tmp_path):
    model = load(make_checkpoint(tmp_path, "llama", tokenizer=False))
    head, (input_ids, targets) = LossHead(model, tile=8), make_batch()
    with pytest.raises(ValueError, match=r"\[N, C\]"):
        head.loss(model, targets[:, 1:], input_ids=input_ids)
    assert model(input_ids).logits.shape == (1, NUM_TOKENS, model.config.vocab_size)


def test_what_it_would_get_wrong_is_refused(tmp_path):
    model = load(make_checkpoint(tmp_path, "llama", tokenizer=False))
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ConfigError, match=r"final_logit_softcapping=30\.0"):
        LossHead(model, tile=8)
    model.config.final_logit_softcapping = None
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ConfigError, match="an output layer of type Sequential"):
        LossHead(model, tile=8)
