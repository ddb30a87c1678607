"""Draws results of the sequence parallelism benchmark, and prints the tables that the documentation shows.

    python -m benchmarks.plot_sequence_parallel sequence-parallel-44 --picture docs/sequence_parallel_44.svg

Of several results, a later one's network takes the place of the same network in earlier ones.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.machine import REPOSITORY
from benchmarks.sequence_parallel import PEER_NAMES

BAR, GAP, LABEL, WIDTH, COLUMN_GAP = 12, 26, 150, 260, 60  # pixels
FORWARD, BACKWARD, WRONG = "#3a6ea5", "#a9c4e0", "#bbbbbb"


def main() -> None:
    """Write the picture and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help="of the results, without .json")
    parser.add_argument("--picture", type=Path, help="SVG; without it only the table of hidden communication")
    arguments = parser.parse_args()
    folder = REPOSITORY / "benchmarks" / "results"
    results = [json.loads((folder / f"{name}.json").read_text()) for name in arguments.names]
    networks = {(each["topology"], each["mbit_per_s"]): each for result in results for each in result["networks"]}
    result = results[0] | {"networks": list(networks.values())}
    if arguments.picture:
        arguments.picture.write_text(draw(result), encoding="utf-8")
        print("\n".join([*make_table(result), ""]))
    print("\n".join(make_hidden_table(result)))


def make_table(result: dict[str, Any]) -> Iterator[str]:
    """Rows of Markdown: forward and backward together, in milliseconds.

    ``auto`` runs the plan in parentheses, which was also timed by itself: the last share but one puts both's rounds
    together, so that it is less than 1 only where another plan would have been faster.
    """
    yield (
        "| network, mask, g, queries | KV ring | TokenRing | best | `auto` | best / `auto` | best / its plan "
        "| best peer / `auto` |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    gains, shares, choices = [], [], []
    for network in result["networks"]:
        for cell in network["cells"]:
            times = {name: engine["seconds"] * 1e3 for name, engine in cell["engines"].items() if engine["correct"]}
            plans = {name: time for name, time in times.items() if name not in (*PEER_NAMES, "auto")}
            peers = {name: time for name, time in times.items() if name in PEER_NAMES}
            best, peer = (
                min(plans, key=lambda name: plans[name]),
                min(peers, key=lambda name: peers[name], default=None),
            )
            shares.append(plans[best] / times["auto"])
            chosen = cell["engines"]["auto"]["plan"]
            pooled = plans | {chosen: _pool(cell["engines"]["auto"], cell["engines"][chosen]) * 1e3}
            choices.append(min(pooled.values()) / pooled[chosen])
            against = "-"
            if peer is not None:
                gains.append(peers[peer] / times["auto"])
                against = f"{gains[-1]:.2f}x ({peer})"
            yield (
                f"| {_describe(network)}, {_describe_cell(cell['cell'])} | {times['kv_ring']:.0f} "
                f"| {times['token_ring']:.0f} | {plans[best]:.0f} ({best}) "
                f"| {times['auto']:.0f} ({chosen}) | {shares[-1]:.2f}x | {choices[-1]:.2f}x | {against} |"
            )
    mean = f"{statistics.geometric_mean(gains):.2f}x" if gains else "-"
    yield f"| geometric mean; least | | | | | {_summarise(shares)} | {_summarise(choices)} | {mean} |"


def _summarise(ratios: list[float]) -> str:
    return f"{statistics.geometric_mean(ratios):.2f}x; {min(ratios):.2f}x"


def _pool(first: dict[str, Any], second: dict[str, Any]) -> float:
    """Median seconds over both's rounds, forward and backward."""
    directions = ("forward", "backward")
    return sum(statistics.median(first[name]["rounds_s"] + second[name]["rounds_s"]) for name in directions)


def make_hidden_table(result: dict[str, Any]) -> Iterator[str]:
    """Rows of Markdown: what each direction takes with computing alone, with communication alone and as it is."""
    yield "| network, mask, g, queries | plan | computing | communication | both | CPU for communication | hidden |"
    yield "|---|---|---|---|---|---|---|"
    for network in result["networks"]:
        for cell in network["cells"]:
            for name, hidden in cell.get("hidden", {}).items():
                halves = [hidden[direction] for direction in ("forward", "backward")]
                columns = [
                    " + ".join(f"{half[key] * 1e3:.0f}" for half in halves)
                    for key in ("compute_s", "communication_s", "both_s", "communication_cpu_s")
                ]
                share = "-" if hidden["hidden"] is None else f"{hidden['hidden']:.0%}"
                label = name if name == hidden["plan"] else f"`{name}` ({hidden['plan']})"
                where = f"{_describe(network)}, {_describe_cell(cell['cell'])}"
                yield f"| {where} | {label} | {' | '.join(columns)} | {share} |"


def draw(result: dict[str, Any]) -> str:
    """A column for each network, a group of bars for each cell, one bar for each engine: forward, then backward."""
    parts, bottom = [], 0
    for column, network in enumerate(result["networks"]):
        left, top = 10 + column * (LABEL + WIDTH + COLUMN_GAP), 20
        parts.append(_text(left, top, f"{_describe(network)}, {result['world_size']} ranks", bold=True))
        for cell in network["cells"]:
            top += GAP
            parts.append(_text(left, top, _describe_cell(cell["cell"]), bold=True))
            top += 5
            longest = max(engine["seconds"] for engine in cell["engines"].values())
            for name, engine in sorted(cell["engines"].items(), key=lambda item: item[1]["seconds"]):
                parts.append(_bars(left, top, name, engine, longest))
                top += BAR
        bottom = max(bottom, top)
    width = 10 + len(result["networks"]) * (LABEL + WIDTH + COLUMN_GAP)
    legend = _text(
        10, bottom + 20, "dark: forward; light: backward; grey: wrong result. Milliseconds, slowest rank, median."
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{bottom + 30}" font-family="sans-serif">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, legend, "</svg>", ""])


def _bars(left: int, top: int, name: str, engine: dict[str, Any], longest: float) -> str:
    forward, backward = (WIDTH * engine[direction]["seconds"] / longest for direction in ("forward", "backward"))
    colors = (FORWARD, BACKWARD) if engine["correct"] else (WRONG, WRONG)
    x = left + LABEL
    label = f"{name} ({engine['plan']})" if name == "auto" else name
    bars = [
        _text(left, top + BAR - 3, label, bold=name == "auto"),
        f'<rect x="{x}" y="{top + 1}" width="{forward:.1f}" height="{BAR - 2}" fill="{colors[0]}"/>',
        f'<rect x="{x + forward:.1f}" y="{top + 1}" width="{backward:.1f}" height="{BAR - 2}" fill="{colors[1]}"/>',
        _text(x + forward + backward + 3, top + BAR - 3, f"{engine['seconds'] * 1e3:.0f}"),
    ]
    return "".join(bars)


def _describe(network: dict[str, Any]) -> str:
    return f"{network['topology']} {network['mbit_per_s']:g} Mbit/s"


def _describe_cell(cell: dict[str, Any]) -> str:
    queries = "long" if cell["num_q"] == cell["num_tokens"] else f"1/{cell['num_tokens'] // cell['num_q']}"
    return f"{cell['mask']}, g={cell['num_heads'] // cell['num_kv_heads']}, {queries}"


def _text(x: float, y: float, words: str, *, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y}" font-size="10"{weight}>{escape(words)}</text>'


if __name__ == "__main__":
    main()
