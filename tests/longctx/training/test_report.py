"""The report: its numbers come from the metrics, its picture shows them, its settings are those that were changed."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from longctx.errors import LongctxError
from longctx.training.config import LoggerConfig, OptimizerConfig, TrainConfig
from longctx.training.loss_curve import draw_losses, smooth
from longctx.training.report import write_report
from longctx.training.step_log import open_step_log
from tests.longctx.training.records import make_record

QUIET = LoggerConfig(tensorboard=False, wandb="false", progress="false")


def record_run(output, records):
    log = open_step_log(QUIET, output, num_steps=10, is_first=True)
    for record in records:
        log.write(record)
    log.close()


def test_the_report_has_the_run(tmp_path):
    output = tmp_path / "my-run"
    evals = {4: 3.0, 8: 2.0, 10: 2.5}
    record_run(output, [make_record(step, eval_loss=evals.get(step), seconds=step / 10) for step in range(1, 11)])
    config = TrainConfig(output=str(output), optimizer=OptimizerConfig(lr=1e-3), logger=QUIET)
    path = write_report(output, config, final=Path("final"), checkpoint=Path("step-10"))
    text = path.read_text()
    for row in (
        "# my-run",
        "| steps | 10 of 10 |",
        "| tokens | 10,000 |",
        "| trained tokens | 9,000 |",
        "| time in steps | 0:06 |",
        "| first loss | 3.9000 |",
        "| final loss (mean of 10 steps) | 3.4500 |",
        "| final eval loss | 2.5000 |",
        "| lowest eval loss | 2.0000 (step 8) |",
        "| median tokens/s | 1,833 |",
        "| median share of peak FLOP/s | 37.5% |",
        "| exported model | `final` |",
        "| last checkpoint | `step-10` |",
        "| 1 | 1.50 |",
        "optimizer.lr: 0.001",
        "logger.tensorboard: False",
    ):
        assert row in text.splitlines()
    assert "best checkpoint" not in text
    assert "optimizer.beta1" not in text
    drawing = ElementTree.parse(output / "loss.svg").getroot()
    assert drawing.tag.endswith("svg")


@pytest.mark.parametrize("num_steps", [1, 5, 200])
def test_the_picture_has_a_point_for_every_step(tmp_path, num_steps):
    records = [make_record(step, num_steps=num_steps, loss=2.0 + step % 2) for step in range(1, num_steps + 1)]
    draw_losses(records, tmp_path / "loss.svg")
    paths = ElementTree.parse(tmp_path / "loss.svg").getroot().iter("{http://www.w3.org/2000/svg}path")
    assert max(path.get("d", "").count("L") for path in paths) >= num_steps - 1


def test_smoothing_keeps_a_constant_and_follows_a_fall():
    assert smooth([2.0] * 50) == pytest.approx([2.0] * 50)
    falling = smooth([4.0 - step / 50 for step in range(100)])
    assert falling == sorted(falling, reverse=True)
    assert falling[0] == 4.0


def test_a_run_without_steps_has_no_report(tmp_path):
    record_run(tmp_path, [])
    with pytest.raises(LongctxError, match="no step was recorded"):
        write_report(tmp_path, TrainConfig())
