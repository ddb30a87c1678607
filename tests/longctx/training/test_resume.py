"""A run that was killed goes on as if nothing had happened, also on other ranks."""

import json
import threading
from pathlib import Path

import pytest

from longctx.errors import CheckpointError, LongctxError, TrainingError, WorkerLostError
from longctx.training.checkpoints import list_checkpoints
from longctx.training.gang import supervise
from tests.longctx.training.faults import BODY, set_faults
from tests.longctx.training.worlds import make_config, read_losses, run_world
from tests.tiny_checkpoints import make_checkpoint

STEPS = ("train.num_steps=8", "train.batch_size=2", "checkpoint.every=2")
NO_EXPORT = "checkpoint.export=false"


def run_until_lost(config):
    with pytest.raises(WorkerLostError):
        run_world(config, body=BODY)


def run_supervised(config, *, max_restarts=3):
    """As a launcher does."""
    return supervise(
        lambda restart: run_world(config, body=BODY, restart=restart),
        max_restarts=max_restarts,
        stop=threading.Event(),
    )


def train_through(folder: Path, *overrides: str) -> list[float]:
    """Losses of a run that nothing interrupts."""
    run_world(make_config(folder, *STEPS, NO_EXPORT, *overrides))
    return read_losses(folder)


def names(output: Path) -> list[str]:
    return [path.name for path in list_checkpoints(output)]


@pytest.fixture(scope="module")
def losses_of_two(tmp_path_factory):
    """Of two ranks that nothing interrupts."""
    return train_through(tmp_path_factory.mktemp("two") / "whole", "parallel.sp_degree=2")


def test_killed_at_any_moment_losses_are_the_same(tmp_path, caplog, losses_of_two):
    """While a checkpoint is written, before it counts, and in a step: the gang starts again by itself."""
    output = tmp_path / "killed"
    set_faults(
        output,
        {"attempt": 0, "rank": 1, "moment": "write", "step": 2},
        {"attempt": 1, "rank": 0, "moment": "commit", "step": 4},
        {"attempt": 2, "rank": 0, "moment": "step", "step": 6},
        {"attempt": 2, "rank": 1, "moment": "step", "step": 6},
    )
    config = make_config(output, *STEPS, NO_EXPORT, "parallel.sp_degree=2")
    assert run_supervised(config)["steps"] == 8
    assert "starting all ranks again from the last checkpoint (3 of 3)" in caplog.text
    assert read_losses(output) == losses_of_two
    assert names(output) == ["step-00000006", "step-00000008"]
    assert len(list((output / "checkpoints").iterdir())) == 2


def test_lost_too_often_leaves_the_last_checkpoint(tmp_path):
    output = tmp_path / "run"
    set_faults(output, *({"attempt": attempt, "moment": "step", "step": 4} for attempt in range(3)))
    with pytest.raises(LongctxError, match=r"after 1 restarts \(cluster.max_restarts\): rank 0 was lost"):
        run_supervised(make_config(output, *STEPS), max_restarts=1)
    assert names(output) == ["step-00000002"]


@pytest.mark.slow
def test_other_ranks_go_on_with_the_losses_of_one(tmp_path):
    """2 -> 1 -> 4 ranks, each with another ZeRO stage."""
    whole = train_through(tmp_path / "whole", "deepspeed.zero_stage=0")
    output = tmp_path / "moved"
    moved = (*STEPS, NO_EXPORT, "deepspeed.persistence_threshold=0")
    set_faults(output, {"rank": 1, "moment": "step", "step": 4})
    run_until_lost(make_config(output, *moved, "parallel.sp_degree=2", "deepspeed.zero_stage=3"))
    set_faults(output, {"moment": "step", "step": 6})
    run_until_lost(make_config(output, *moved))
    run_world(
        make_config(
            output,
            *moved,
            "parallel.dp_degree=2",
            "parallel.sp_degree=2",
            "deepspeed.zero_stage=2",
            "deepspeed.offload_optimizer=true",
        )
    )
    assert read_losses(output) == pytest.approx(whole, rel=1e-6)


SHARDINGS = [
    ("parallel.sp_degree=2", "deepspeed.zero_stage=0"),
    ("deepspeed.zero_stage=1",),
    ("parallel.dp_degree=2", "deepspeed.zero_stage=1", "deepspeed.offload_optimizer=true"),
    ("parallel.sp_degree=3", "deepspeed.zero_stage=2"),
    ("parallel.dp_degree=2", "parallel.sp_degree=2", "deepspeed.zero_stage=3"),
    ("parallel.sp_degree=2", "deepspeed.zero_stage=3", "deepspeed.offload_optimizer=true"),
    ("parallel.dp_degree=2", "deepspeed.zero_stage=3", "deepspeed.offload_params=true"),
    (
        "parallel.sp_degree=2",
        "deepspeed.zero_stage=3",
        "deepspeed.offload_optimizer=true",
        "deepspeed.offload_params=true",
    ),
    ("parallel.dp_degree=2", "deepspeed.zero_stage=3", "train.activation_offload=true", "train.mlp_tile=16"),
]


@pytest.mark.slow
def test_any_sharding_goes_on_from_any_other(tmp_path):
    dtype = "model.dtype=float32"
    whole = train_through(tmp_path / "whole", "deepspeed.zero_stage=1", dtype, "train.num_steps=20")
    output = tmp_path / "moved"
    for index, sharding in enumerate(SHARDINGS):
        set_faults(output, {"rank": 0, "moment": "step", "step": 2 * index + 4})
        config = make_config(
            output, *STEPS, NO_EXPORT, dtype, "train.num_steps=20", "deepspeed.persistence_threshold=0", *sharding
        )
        if index < len(SHARDINGS) - 1:
            run_until_lost(config)
        else:
            run_world(config)
    assert read_losses(output) == pytest.approx(whole, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_bfloat16_goes_on_exactly(tmp_path, stage):
    """On as many ranks as before the roundings are the same, too."""
    settings = ("model.dtype=bfloat16", "parallel.sp_degree=2", f"deepspeed.zero_stage={stage}")
    whole = train_through(tmp_path / "whole", *settings)
    output = tmp_path / "killed"
    set_faults(output, {"rank": 1, "moment": "step", "step": 4})
    run_supervised(make_config(output, *STEPS, NO_EXPORT, *settings))
    assert read_losses(output) == whole


def test_a_request_to_stop_saves(tmp_path, losses_of_two):
    output = tmp_path / "run"
    config = make_config(output, *STEPS, "parallel.sp_degree=2")
    set_faults(output, {"rank": 1, "moment": "stop", "step": 3})
    report = run_world(config, body=BODY)
    assert (report["steps"], report["stopped"], report["final"]) == (3, True, None)
    assert names(output) == ["step-00000002", "step-00000003"]
    assert run_world(config)["final"] == str(output / "final")
    assert read_losses(output) == losses_of_two


@pytest.mark.slow
def test_a_full_disk_does_not_end_the_training(tmp_path):
    output = tmp_path / "run"
    set_faults(output, {"rank": 1, "moment": "full", "step": 4}, {"attempt": 1, "moment": "full", "step": 9})
    config = make_config(output, *STEPS, NO_EXPORT, "parallel.sp_degree=2")
    assert run_world(config, body=BODY)["steps"] == 8
    assert names(output) == ["step-00000006", "step-00000008"]
    longer = make_config(output, *STEPS, NO_EXPORT, "train.num_steps=9")
    with pytest.raises(TrainingError, match=r"step 9 could not be written .* last good checkpoint is .*step-00000008"):
        run_world(longer, body=BODY, restart=1)


@pytest.mark.slow
def test_what_a_checkpoint_is_not_of_is_named(tmp_path):
    output = tmp_path / "run"
    run_world(make_config(output, "train.num_steps=2", NO_EXPORT))
    again = ("train.num_steps=3", NO_EXPORT)
    other = tmp_path / "other.jsonl"
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    other.write_text("".join(json.dumps({"text": f"other {number}"}) + "\n" for number in range(len(lines))))
    for changes, words in (
        (["peft.method=lora"], r"another model or adapter: .* peft\.method=lora \(was none\)"),
        ([f"data.path={other}"], "keep data.path"),
        (["train.batch_size=2"], "keep train.batch_size"),
        (["train.context_length=32"], "keep train.context_length"),
        (["data.long_rows=skip"], "keep data.long_rows"),
    ):
        with pytest.raises(CheckpointError, match=words):
            run_world(make_config(output, *again, *changes))
    assert names(output) == ["step-00000002"]
    run_world(make_config(output, *again, "checkpoint.resume=must"))
    assert names(output) == ["step-00000002", "step-00000003"]


@pytest.mark.slow
def test_never_starts_anew_and_goes_on_from_its_own(tmp_path):
    """Also after it was killed; what was there before is set aside."""
    output = tmp_path / "run"
    config = make_config(output, *STEPS, NO_EXPORT)
    run_world(config)
    whole = read_losses(output)
    set_faults(output, {"moment": "step", "step": 6})
    again = make_config(output, *STEPS, NO_EXPORT, "checkpoint.resume=never")
    run_supervised(again)
    assert read_losses(output) == whole
    assert len(list((output / "checkpoints-1").iterdir())) == 2
    assert names(output) == ["step-00000006", "step-00000008"]


def test_numbers_that_are_none_end_the_run(tmp_path):
    output = tmp_path / "run"
    config = make_config(output, "optimizer.lr=1e30", "optimizer.clip=0", "checkpoint.every=1", "parallel.sp_degree=2")
    with pytest.raises(TrainingError) as raised:
        run_supervised_once(config)
    told = str(raised.value)
    assert told.startswith("step 2: ")
    assert f"rows of its sequences: {tmp_path}/rows.jsonl:" in told
    assert "there is no good checkpoint before; step-00000001 has the weights that it happened with" in told


def test_a_tokenizer_must_fit_the_model(tmp_path):
    """Its highest tokens would be rows that the embedding does not have."""
    model = make_checkpoint(tmp_path / "small", "llama", vocab_size=258, pad_token_id=None)
    with pytest.raises(CheckpointError, match="the tokenizer has 260 tokens, the model 258"):
        run_supervised_once(make_config(tmp_path / "run", model=model))


def run_supervised_once(config):
    """A second attempt would be a failure of the test."""
    return supervise(
        lambda restart: pytest.fail("started again") if restart else run_world(config),
        max_restarts=3,
        stop=threading.Event(),
    )


@pytest.mark.slow
def test_the_best_are_told_by_one_measure(tmp_path):
    """A checkpoint of a step without an evaluation is evaluated; training losses are not compared with it."""
    output = tmp_path / "run"
    config = make_config(
        output,
        "train.num_steps=4",
        NO_EXPORT,
        "checkpoint.every=1",
        "checkpoint.keep_best=1",
        "checkpoint.keep_last=4",
        f"data.eval_path={tmp_path}/rows.jsonl",
        "train.eval_every=3",
        "train.eval_sequences=2",
    )
    run_world(config)
    states = [json.loads((path / "state.json").read_text()) for path in list_checkpoints(output)]
    assert len({state["metric"] for state in states}) == 4
    assert all(state["metric"] == state["eval_loss"] for state in states)
    assert "best checkpoint" in (output / "report.md").read_text()
