"""The log of a run: lines, files that go on after a restart, places that fail."""

import io
import json
import logging
import math
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from longctx.errors import ConfigError, LongctxError
from longctx.training.config import LoggerConfig
from longctx.training.sinks.lines import describe_duration, describe_step
from longctx.training.sinks.metrics_file import MetricsFile, read_metrics
from longctx.training.sinks.sink import LoggedRun, Sink
from longctx.training.step_log import StepLog, open_step_log
from tests.longctx.training.records import make_record

QUIET = LoggerConfig(tensorboard=False, wandb="false", progress="false")


def open_log(output, config=QUIET, **changed):
    return open_step_log(config, output, **{"num_steps": 10, "is_first": True, "start_step": 0} | changed)


def test_a_line_says_everything():
    record = make_record(7, eval_loss=3.5, num_skipped_rows=2)
    assert describe_step(record, 3725.0) == (
        "step  7/10  loss 3.3000  2,000 tokens/s  38% of peak FLOP/s  1.50 GiB  grad norm 1.25  lr 3.00e-04  "
        "ETA 1:02:05  2 rows skipped  eval loss 3.5000"
    )
    assert [describe_duration(seconds) for seconds in (0, 59.6, 3600)] == ["0:00", "1:00", "1:00:00"]


def test_lines_come_every_so_often_and_where_it_matters(tmp_path, caplog):
    log = open_log(tmp_path, LoggerConfig(every=4, tensorboard=False, wandb="false", progress="false"))
    with caplog.at_level(logging.INFO, "longctx.training"):
        for step in range(1, 11):
            log.write(make_record(step, eval_loss=3.0 if step == 6 else None))
    log.close()
    assert [int(line.split()[1].split("/")[0]) for line in caplog.messages] == [1, 4, 6, 8, 10]
    assert "ETA 0:03" in caplog.messages[1]  # six steps of half a second
    assert [each.step for each in read_metrics(tmp_path)] == list(range(1, 11))


def test_metrics_come_back_as_they_were(tmp_path):
    log = open_log(tmp_path)
    records = [make_record(1, eval_loss=2.5), make_record(2, grad_norm=math.inf)]
    for record in records:
        log.write(record)
    log.close()
    first, second = read_metrics(tmp_path)
    assert first == records[0]
    assert math.isnan(second.grad_norm)
    assert "Infinity" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_run_that_goes_on_cuts_what_it_computes_again(tmp_path):
    log = open_log(tmp_path)
    for step in range(1, 7):
        log.write(make_record(step))
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "num_st')  # killed while writing
    log = open_log(tmp_path, start_step=4)
    log.write(make_record(5, loss=1.0))
    log.close()
    assert [(each.step, each.loss) for each in read_metrics(tmp_path)][3:] == [(4, 3.6), (5, 1.0)]


def test_other_ranks_write_nothing(tmp_path):
    log = open_log(tmp_path, LoggerConfig(wandb="false"), is_first=False)
    log.write(make_record(1))
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_bad_metrics_name_the_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n")
    with pytest.raises(LongctxError, match="line 1 is no record of a step"):
        read_metrics(tmp_path)
    with pytest.raises(LongctxError, match="cannot be read"):
        read_metrics(tmp_path / "absent")


def test_tensorboard_forgets_the_steps_that_are_computed_again(tmp_path):
    config = LoggerConfig(wandb="false", progress="false")
    for start_step in (0, 2):
        log = open_log(tmp_path, config, start_step=start_step)
        for step in range(start_step + 1, start_step + 4):
            log.write(make_record(step, loss=float(10 * start_step + step)))
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    points = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert points == [(1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0), (5, 25.0)]
    assert events.Scalars("memory/rank_1_bytes")[0].value == 3 * 2**29


class FullDisk(Sink):
    """Its disk is full from step 2."""

    def write(self, record, eta_s):
        if record.step >= 2:
            raise OSError("No space left on device")


def test_a_place_that_fails_is_given_up_and_the_others_go_on(tmp_path, caplog):
    run = LoggedRun(QUIET, tmp_path, num_steps=10, start_step=0)
    log = StepLog({"full": FullDisk(), "metrics": MetricsFile(run)})
    for step in (1, 2, 3):
        log.write(make_record(step))
    log.close()
    assert caplog.messages == ["step 2: full is not written any more: No space left on device"]
    assert len(read_metrics(tmp_path)) == 3


def test_the_bar_stays_below_what_others_log(tmp_path, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    num_handlers = len(logging.getLogger().handlers)
    log = open_log(tmp_path, LoggerConfig(progress="true", tensorboard=False, wandb="false"))
    log.write(make_record(5))
    written = screen.getvalue()
    assert "█" * 10 + "░" * 10 in written
    assert "step  5/10  loss 3.5000" in written
    assert "\n" not in written
    logging.getLogger().warning("something else")
    assert screen.getvalue()[len(written) :].startswith("\r\x1b[K")
    log.close()
    assert len(logging.getLogger().handlers) == num_handlers


def test_weights_and_biases_gets_scalars_and_the_same_run_again(tmp_path, monkeypatch):
    calls = []
    package: Any = ModuleType("wandb")
    package.__spec__ = ModuleSpec("wandb", None)

    class Run:
        def log(self, scalars, step):
            calls.append((step, scalars["train/loss"]))

        def finish(self):
            calls.append("finish")

    def init(**arguments):
        calls.append(arguments)
        return Run()

    package.init = init
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.setenv("WANDB_API_KEY", "x")
    config = LoggerConfig(tensorboard=False, progress="false", wandb_project="p")
    for start_step in (0, 1, 0):
        log = open_log(tmp_path / "run", config, start_step=start_step)
        log.write(make_record(start_step + 1))
        log.close()
    first, again, anew = (call for call in calls if isinstance(call, dict))
    assert (first["project"], first["name"]) == ("p", "run")
    assert first["id"] == again["id"] != anew["id"]
    assert calls[1:3] == [(1, 3.9), "finish"]


def test_weights_and_biases_is_used_only_where_it_can_be(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("longctx.training.sinks.wandb.find_spec", lambda name: None)
    monkeypatch.setenv("WANDB_API_KEY", "x")
    open_log(tmp_path, LoggerConfig(tensorboard=False)).close()
    with pytest.raises(ConfigError, match=r"logger\.wandb=true is not allowed"):
        open_log(tmp_path, LoggerConfig(tensorboard=False, wandb="true"))
