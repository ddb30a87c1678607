"""What cannot be trained is refused before anything heavy is loaded, and the text says what would fit."""

import subprocess
import sys
from pathlib import Path

import pytest

from longctx.config import compose
from longctx.errors import CheckpointError, ConfigError
from longctx.training.config import TrainConfig
from longctx.training.preflight import check_config, check_files
from tests.tiny_checkpoints import make_checkpoint

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.batch_size=3", "parallel.dp_degree=2"], "a batch of 2 or 4 would fit"),
        (["train.context_length=20", "parallel.sp_degree=4"], "at least 32, 8 tokens a rank; .*sp_degree=2 would fit"),
        (["deepspeed.zero_stage=0", "deepspeed.offload_optimizer=true"], "it takes stage 1, 2 or 3"),
        (["deepspeed.zero_stage=2", "deepspeed.offload_params=true"], "it takes stage 3"),
        (["train.activation_offload=true", "train.activation_checkpointing=false"], "activation_checkpointing=true"),
        (["train.eval_every=5"], "without data.eval_path"),
        (["logger.trace_steps=[0,3]"], "there is no step 0; 1 to train.num_steps, 100"),
        (["logger.trace_steps=[1,500]"], "there is no step 500"),
        (["attention=sf", "attention.group_size=8", "attention.sink_tokens=5"], "at most half of .*group_size, 4"),
    ],
)
def test_what_does_not_go_together(overrides, words):
    with pytest.raises(ConfigError, match=words):
        check_config(compose(TrainConfig, "train", overrides))


def test_what_goes_together():
    check_config(compose(TrainConfig, "train", ["parallel.sp_degree=4", "train.context_length=33"]))
    check_config(compose(TrainConfig, "train", ["deepspeed=zero3_offload", "train.activation_offload=true"]))


def test_models_and_data(tmp_path):
    rows, empty = tmp_path / "rows.jsonl", tmp_path / "empty.jsonl"
    rows.write_text('{"text": "a"}\n')
    empty.touch()
    folder, windowed, dropping = (tmp_path / name for name in ("llama", "mistral", "dropping"))
    for name, family, changes in (
        (folder, "llama", {}),
        (windowed, "mistral", {}),
        (dropping, "llama", {"attention_dropout": 0.1}),
    ):
        make_checkpoint(name, family, tokenizer=False, **changes)
    good = [f"model.path={folder}", f"data.path={rows}", f"output={tmp_path}", "train.context_length=1024"]
    check_files(compose(TrainConfig, "train", good))
    check_files(compose(TrainConfig, "train", [*good, "train.context_length=2048", "model.rope_scaling=yarn"]))
    for overrides, words in (
        ([f"model.path={tmp_path}/none"], "none: no such folder"),
        ([f"model.path={dropping}"], "attention_dropout=0.1 is not supported"),
        ([f"model.path={windowed}", "attention=sf"], "mistral has sliding windows of 48 tokens; dense"),
        (["train.context_length=2048"], "llama takes at most 1024 tokens; model.rope_scaling=yarn"),
        (["data.path=null"], "data.path is not set"),
        ([f"data.path={tmp_path}/none"], r"data\.path=.*none does not exist"),
        ([f"data.path={empty}"], r"empty\.jsonl is empty: 1 files without a byte"),
        ([f"data.eval_path={empty}"], r"data\.eval_path=.*empty\.jsonl is empty"),
        ([f"peft.path={tmp_path}/none"], "none: no such folder; an adapter is"),
        ([f"data.chat_template={tmp_path}/none"], r"data\.chat_template=.*none is not allowed: there is no such file"),
        ([f"parallel.links_file={tmp_path}/none"], r"parallel\.links_file is not allowed: .*none cannot be read"),
        (["checkpoint.resume=must"], "there is no checkpoint, and checkpoint.resume is must"),
    ):
        with pytest.raises((ConfigError, CheckpointError), match=words):
            check_files(compose(TrainConfig, "train", [*good, *overrides]))


def test_nothing_heavy_is_loaded():
    """The command as a user runs it: it ends before torch and Ray could be there."""
    script = (
        "import sys; from longctx.cli.main import main; code = main(sys.argv[1:]);"
        "print(code, [name for name in ('torch', 'ray', 'transformers', 'deepspeed') if name in sys.modules])"
    )
    words = [sys.executable, "-c", script, "train", "data.path=README.md", "model.path=README.md"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines()[-1] == "2 []", done.stderr
    assert "error: " in done.stderr
    assert "README.md: is a file; model.path is demo or a Hugging Face checkpoint folder" in done.stderr


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_layers_that_an_adapter_is_to_change(method):
    words = ["data.path=demo", f"peft={method}", "peft.target_modules=[q_proj,queries]"]
    with pytest.raises(ConfigError, match="queries matches no linear layer of this model; allowed: q_proj, k_proj"):
        check_files(compose(TrainConfig, "train", words))
