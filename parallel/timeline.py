"""A picture of predicted schedules: per rank what computes and what is on its links at each moment, as SVG."""

from collections.abc import Sequence
from html import escape

from parallel.prediction import Event, Prediction

WIDTH, LABEL_WIDTH, MARGIN = 900, 120, 16  # pixels: the time axis, the lanes' names, around everything
LANE, GAP, HEAD = 14, 6, 34  # pixels: height of a lane, between ranks, above a schedule
MAX_LINKS = 8  # links of a rank that get a lane each; more share one
COLORS = {"compute": "#9aa5b1", "q": "#e07b39", "kv": "#3a8f5c", "q return": "#f2b880", "kv return": "#9fd3b2"}
LEGEND = {
    "compute": "computes (of whose queries)",
    "q": "queries",
    "kv": "keys and values",
    "q return": "partial outputs, dQ",
    "kv return": "dK and dV",
}


def draw_timeline(schedules: Sequence[tuple[str, Prediction]], table: Sequence[str]) -> str:
    """The picture.

    Args:
        schedules: title and schedule, drawn one below the other over one scale of time.
        table: lines of text below them.

    Returns:
        SVG, with the times, bytes and steps of everything in it as tooltips.
    """
    longest = max((schedule.seconds for _, schedule in schedules), default=0.0) or 1.0
    parts, top = [_legend()], MARGIN + 24
    for title, schedule in schedules:
        lanes, height = _place_lanes(schedule)
        parts.append(_text(MARGIN, top + 14, title, bold=True))
        parts.append(_axis(top + HEAD, height, longest))
        for (rank, peer), offset in lanes.items():
            name = f"rank {rank}" if peer == rank else f"to {peer}" if peer >= 0 else "sends"
            parts.append(_text(MARGIN + (0 if peer == rank else 56), top + HEAD + offset + LANE - 3, name))
        parts += [_bar(event, top + HEAD + lanes[_lane(event, lanes)], longest) for event in schedule.events]
        top += HEAD + height + 26
    for line in table:
        top += 16
        parts.append(_text(MARGIN, top, line, mono=True))
    width, height = 2 * MARGIN + LABEL_WIDTH + WIDTH, top + MARGIN
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>", ""])


def _place_lanes(schedule: Prediction) -> tuple[dict[tuple[int, int], int], int]:
    """(rank, peer) to the lane's offset, and the height of all; peer is the rank itself where it computes."""
    peers: dict[int, set[int]] = {rank: set() for rank in range(schedule.plan.problem.world_size)}
    for event in schedule.events:
        if event.peer != event.rank:
            peers[event.rank].add(event.peer)
    lanes: dict[tuple[int, int], int] = {}
    offset = 0
    for rank, links in peers.items():
        for peer in (rank, *(sorted(links) if len(links) <= MAX_LINKS else (-1,))):
            lanes[rank, peer] = offset
            offset += LANE
        offset += GAP
    return lanes, offset


def _lane(event: Event, lanes: dict[tuple[int, int], int]) -> tuple[int, int]:
    return (event.rank, event.peer) if (event.rank, event.peer) in lanes else (event.rank, -1)


def _bar(event: Event, top: int, longest: float) -> str:
    left = MARGIN + LABEL_WIDTH + WIDTH * event.start_s / longest
    width = max(0.5, WIDTH * (event.stop_s - event.start_s) / longest)
    what = "computes" if event.kind == "compute" else f"{event.kind} to {event.peer}, {event.num_bytes} bytes"
    tip = f"step {event.step}: {what}, of rank {event.owner}, {event.start_s * 1e3:.4g} to {event.stop_s * 1e3:.4g} ms"
    box = f'x="{left:.1f}" y="{top + 1}" width="{width:.1f}" height="{LANE - 2}"'
    bar = (
        f'<rect {box} fill="{COLORS[event.kind]}" stroke="white" stroke-width="0.5"><title>{escape(tip)}</title></rect>'
    )
    return bar + (_text(left + 3, top + LANE - 3, str(event.owner)) if width > 14 else "")


def _axis(top: int, height: int, longest: float) -> str:
    parts = []
    for tick in range(5):
        x = MARGIN + LABEL_WIDTH + WIDTH * tick / 4
        parts.append(f'<line x1="{x}" y1="{top}" x2="{x}" y2="{top + height}" stroke="#dddddd"/>')
        parts.append(_text(x, top + height + 10, f"{longest * tick / 4 * 1e3:.4g} ms"))
    return "".join(parts)


def _legend() -> str:
    parts, left = [], MARGIN
    for kind, words in LEGEND.items():
        parts.append(f'<rect x="{left}" y="{MARGIN}" width="12" height="12" fill="{COLORS[kind]}"/>')
        parts.append(_text(left + 16, MARGIN + 10, words))
        left += 40 + 6 * len(words)
    return "".join(parts)


def _text(x: float, y: float, words: str, *, bold: bool = False, mono: bool = False) -> str:
    style = (' font-weight="bold"' if bold else "") + (' font-family="monospace" xml:space="preserve"' if mono else "")
    return f'<text x="{x:.1f}" y="{y}" font-size="10"{style}>{escape(words)}</text>'
