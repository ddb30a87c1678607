"""The loss of a run as a picture. The one module that knows matplotlib."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from longctx.training.record import StepRecord

_SIZE = (8.0, 4.5)  # inches
_SMOOTHING = 0.02  # weight of a step in the smooth line, or more in a short run
_MIN_SMOOTHED = 20  # steps from which a smooth line says something


def draw_losses(records: Sequence[StepRecord], path: Path) -> None:
    """Write an SVG of the training loss over the steps, and of the evaluations."""
    figure = Figure(figsize=_SIZE, layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    steps, losses = [record.step for record in records], [record.loss for record in records]
    is_long = len(records) >= _MIN_SMOOTHED
    marker = "o" if len(records) == 1 else None
    axes.plot(steps, losses, color="tab:blue", alpha=0.3 if is_long else 1.0, linewidth=1, marker=marker, label="loss")
    if is_long:
        axes.plot(steps, smooth(losses), color="tab:blue", label="loss, smoothed")
    evaluated = {record.step: record.eval_loss for record in records if record.eval_loss is not None}
    if evaluated:
        axes.plot([*evaluated], [*evaluated.values()], "o-", color="tab:orange", label="eval loss")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="svg", metadata={"Date": None})


def smooth(losses: Sequence[float]) -> list[float]:
    """A mean in which a loss counts less with every step that it is old; the first ones are not favoured."""
    weight = max(_SMOOTHING, 2 / (len(losses) + 1) ** 0.75)
    smoothed, total, mass = [], 0.0, 0.0
    for loss in losses:
        total = (1 - weight) * total + weight * loss
        mass = (1 - weight) * mass + weight
        smoothed.append(total / mass)
    return smoothed
