"""What a training exports is what it trained: transformers loads it and finds the same loss, longctx serves it."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from longctx.models.checkpoint import inspect_checkpoint
from longctx.models.tokenizer import load_tokenizer
from longctx.training import export
from longctx.training.checkpoints import CheckpointReader, list_checkpoints
from longctx.training.data.documents import IGNORED
from longctx.training.data.stream import read_eval_sequences
from tests.longctx.greedy import generate_packed, generate_reference, load_decoder
from tests.longctx.training.worlds import make_config, run_world, write_rows
from tests.tiny_checkpoints import FAMILIES, make_checkpoint

NUM_SEQUENCES = 2


def measure_loss(folder: Path, config) -> float:
    """The evaluation's, by transformers alone, each document by itself."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sequences = read_eval_sequences(
        config.data,
        load_tokenizer(inspect_checkpoint(folder)),
        context_length=config.train.context_length,
        num_sequences=NUM_SEQUENCES,
    )
    total, count = 0.0, 0
    for sequence in sequences:
        for start, stop in pairwise(sequence.cu_seqlens):
            labels = sequence.labels[:, start:stop]
            with torch.no_grad():
                logits = model(sequence.input_ids[:, start:stop]).logits[0, :-1]
            total += float(
                torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=IGNORED, reduction="sum")
            )
            count += int((labels[0, 1:] != IGNORED).sum())
    return total / count


def train(folder: Path, model: Path, *overrides: str):
    """Its configuration, and the loss of the last weights."""
    rows = write_rows(folder / "rows.jsonl", 20, longest=40)
    evaluated = (f"data.eval_path={rows}", f"train.eval_sequences={NUM_SEQUENCES}", "train.num_steps=2")
    config = make_config(folder / "run", *evaluated, *overrides, model=model)
    report = run_world(config)
    assert report["final"] == str(folder / "run" / "final")
    return config, report["eval_loss"]


def check_served(folder: Path, num_tokens: int) -> None:
    """longctx continues a prompt as transformers does."""
    prompt = list(b"alpha beta and the stone " * 10)[:num_tokens]
    served = generate_packed(load_decoder(folder), [prompt], num_new=6)
    assert served == generate_reference(folder, [prompt], num_new=6)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_loss_it_was_trained_to(tmp_path, family):
    model = make_checkpoint(tmp_path / family, family)
    config, loss = train(tmp_path, model)
    final = tmp_path / "run" / "final"
    assert measure_loss(final, config) == pytest.approx(loss, rel=1e-5)
    assert measure_loss(model, config) > loss + 0.01
    before, after = inspect_checkpoint(model), inspect_checkpoint(final)
    for name in ("family", "max_context", "sliding_windows", "tie_word_embeddings", "eos_token_ids", "num_parameters"):
        assert getattr(after, name) == getattr(before, name)
    check_served(final, 60)


@pytest.mark.parametrize(("scaling", "length"), [("yarn", 192), ("linear", 100), ("dynamic", 97)])
def test_a_longer_context_is_in_the_configuration(tmp_path, scaling, length):
    model = make_checkpoint(tmp_path / "short", "llama", max_position_embeddings=48)
    changes = (f"model.rope_scaling={scaling}", f"train.context_length={length}", "parallel.sp_degree=2")
    config, loss = train(tmp_path, model, *changes)
    spec = inspect_checkpoint(tmp_path / "run" / "final")
    assert (spec.rope_type, spec.max_context) == (scaling, length)
    check_served(spec.path, 80)
    assert measure_loss(spec.path, config) == pytest.approx(loss, rel=1e-5)


def test_random_weights_in_several_files(tmp_path, monkeypatch):
    """From a folder without weights, in bfloat16, with a chat template of the user's."""
    model = make_checkpoint(tmp_path / "empty", "qwen2", tie_word_embeddings=True)
    (model / "model.safetensors").unlink()
    template = tmp_path / "own.jinja"
    template.write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    changes = ("model.init=random", "model.dtype=bfloat16", f"data.chat_template={template}")
    config, _ = train(tmp_path, model, *changes)
    final = tmp_path / "run" / "final"
    assert inspect_checkpoint(final).dtype == "bfloat16"
    assert load_tokenizer(inspect_checkpoint(final)).chat_template == template.read_text()
    monkeypatch.setattr(export, "MAX_FILE_BYTES", 20_000)
    reader = CheckpointReader(list_checkpoints(tmp_path / "run")[-1])
    whole = replace(config, checkpoint=replace(config.checkpoint, export_dtype="float32"))
    precise = export.export_model(reader, whole, inspect_checkpoint(model, require_weights=False), tmp_path / "precise")
    assert inspect_checkpoint(precise).dtype == "float32"
    assert {oct(path.stat().st_mode) for path in precise.iterdir()} == {oct((precise / "config.json").stat().st_mode)}
    pieces = export.export_model(reader, config, inspect_checkpoint(model, require_weights=False), tmp_path / "pieces")
    places = json.loads((pieces / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(places.values())) == len(list(pieces.glob("*.safetensors"))) > 3
    assert inspect_checkpoint(pieces).num_parameters == inspect_checkpoint(final).num_parameters
    assert measure_loss(pieces, config) == measure_loss(final, config)
