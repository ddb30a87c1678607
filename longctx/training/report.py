"""What a run came to: ``output/report.md`` with the loss curve as a picture, made from ``output/metrics.jsonl``."""

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from longctx.errors import LongctxError
from longctx.training.config import TrainConfig
from longctx.training.record import StepRecord
from longctx.training.sinks.lines import describe_duration
from longctx.training.sinks.metrics_file import read_metrics

REPORT_NAME, PICTURE_NAME = "report.md", "loss.svg"
_NUM_LAST = 10  # steps whose mean loss is the final one: one step's depends on its batch


def write_report(
    output: Path,
    config: TrainConfig,
    *,
    final: Path | None = None,
    checkpoint: Path | None = None,
    best: Path | None = None,
) -> Path:
    """Write the report of the run in ``output`` and its picture; returns the report's path.

    Args:
        output: the run's folder, with its metrics.
        config: of the run.
        final: the folder that was exported, if one was.
        checkpoint, best: the last and the best checkpoint that are kept.

    Raises:
        LongctxError: if there are no metrics.
    """
    from longctx.training.loss_curve import draw_losses  # half a second that no first step should wait for

    records = read_metrics(output)
    if not records:
        raise LongctxError(f"{output}: no step was recorded, so there is nothing to report")
    draw_losses(records, output / PICTURE_NAME)
    folders = {"exported model": final, "last checkpoint": checkpoint, "best checkpoint": best}
    rows = [*_describe_run(records), *((name, f"`{path}`") for name, path in folders.items() if path is not None)]
    text = "\n".join(
        [
            f"# {output.name}",
            "",
            f"![loss over the steps]({PICTURE_NAME})",
            "",
            *_make_table(("", ""), rows),
            "",
            "## Memory",
            "",
            *_make_table(("rank", "peak GiB"), _describe_memory(records)),
            "",
            "## Settings that differ from the defaults",
            "",
            "```yaml",
            *_list_settings(config),
            "```",
            "",
        ]
    )
    path = output / REPORT_NAME
    path.write_text(text, encoding="utf-8")
    return path


def _describe_run(records: Sequence[StepRecord]) -> Iterator[tuple[str, str]]:
    last = records[-1]
    final = records[-_NUM_LAST:]
    yield "steps", f"{last.step} of {last.num_steps}"
    yield "tokens", f"{sum(each.num_tokens for each in records):,}"
    yield "trained tokens", f"{sum(each.num_trained_tokens for each in records):,}"
    yield "time in steps", describe_duration(sum(each.seconds for each in records))
    yield "first loss", f"{records[0].loss:.4f}"
    yield f"final loss (mean of {len(final)} steps)", f"{statistics.fmean(each.loss for each in final):.4f}"
    evaluated = [(each.eval_loss, each.step) for each in records if each.eval_loss is not None]
    if evaluated:
        yield "final eval loss", f"{evaluated[-1][0]:.4f}"
        yield "lowest eval loss", f"{min(evaluated)[0]:.4f} (step {min(evaluated)[1]})"
    yield "median tokens/s", f"{statistics.median(each.tokens_per_s for each in records):,.0f}"
    yield "median share of peak FLOP/s", f"{statistics.median(each.flops_share for each in records):.1%}"
    yield "highest gradient norm", f"{max(each.grad_norm for each in records):.3g}"
    yield "rows skipped", f"{last.num_skipped_rows:,}"


def _describe_memory(records: Sequence[StepRecord]) -> Iterator[tuple[str, str]]:
    """Of each rank of the last start; the highest over all of its steps."""
    num_ranks = len(records[-1].memory_bytes)
    alike = [each.memory_bytes for each in records if len(each.memory_bytes) == num_ranks]
    for rank in range(num_ranks):
        yield str(rank), f"{max(sizes[rank] for sizes in alike) / 2**30:.2f}"


def _make_table(header: tuple[str, str], rows: Sequence[tuple[str, str]] | Iterator[tuple[str, str]]) -> list[str]:
    return [f"| {left} | {right} |" for left, right in (header, ("---", "---"), *rows)]


def _list_settings(config: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys whose value is not the default, as the command line takes them."""
    default = type(config)()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _list_settings(value, f"{prefix}{field.name}.")
        elif value != getattr(default, field.name):
            yield f"{prefix}{field.name}: {value}"
