"""Latencies over the rate, as PNG: one panel for each, a line for each fleet, limits dashed."""

from collections.abc import Sequence
from pathlib import Path

from cluster.fleet.search import Point
from cluster.fleet.slo import LIMITS, PERCENTILES

DPI = 120


def draw_points(points: Sequence[Point], path: Path) -> None:
    """Draw the slowdowns of ``points``; raises ``OSError`` if the file cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(LIMITS), len(PERCENTILES), figsize=(12, 9), sharex=True, squeeze=False)
    fleets: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda point: point.rate):
        counts = [sum(count for _, count in group) for group in (point.plan.prefill, point.plan.decode)]
        fleets.setdefault(f"{counts[0]}P + {counts[1]}D", []).append(point)
    for row, (name, limits) in enumerate(LIMITS.items()):
        for column, (percent, limit) in enumerate(zip(PERCENTILES, limits, strict=True)):
            panel = panels[row][column]
            for fleet, own in fleets.items():
                values = [min(point.latencies.slowdowns[name][column], 2 * limit) for point in own]
                panel.plot([point.rate for point in own], values, marker="o", markersize=3, label=fleet)
            panel.axhline(limit, color="black", linestyle="--", linewidth=0.8)
            panel.set_title(f"{name.upper()} p{percent}, times alone", fontsize=9)
            panel.set_ylim(bottom=0, top=2.05 * limit)
            if row == len(LIMITS) - 1:
                panel.set_xlabel("requests/s")
    panels[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)
