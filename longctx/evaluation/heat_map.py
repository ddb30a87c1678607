"""A grid as a picture: depth (or position) by length, as SVG. Green is good."""

from html import escape

from longctx.evaluation.summary import Grid, show_value

CELL_WIDTH, CELL_HEIGHT = 92, 34  # pixels
LEFT, TOP, MARGIN = 130, 78, 16  # pixels: the rows' names, title and columns' names, around everything
BAD, MIDDLE, GOOD = (214, 96, 77), (253, 219, 132), (102, 178, 112)  # RGB
EMPTY = "#eeeeee"


def draw_heat_map(grid: Grid, title: str) -> str:
    """The picture, with a row below that is the mean of each length."""
    values = [value for row in grid.values for value in row if value is not None]
    low, high = (min(values), max(values)) if grid.is_perplexity else (0.0, 1.0)
    rows = [*zip(grid.rows, grid.values, strict=True), ("all", grid.overall)]
    what = "perplexity by position" if grid.is_perplexity else "score by depth of the answer"
    parts = [
        _text(MARGIN, 26, f"{grid.task}: {title}", size=15),
        _text(MARGIN, 46, f"{what} (rows) and tokens of the prompt (columns)", size=12),
    ]
    for column, (length, count) in enumerate(zip(grid.lengths, grid.num_prompts, strict=True)):
        x = LEFT + (column + 0.5) * CELL_WIDTH
        parts.append(_text(x, TOP - 8, f"{length}", size=12, anchor="middle", tip=f"{count} prompts"))
    for index, (name, row) in enumerate(rows):
        top = TOP + index * CELL_HEIGHT + (6 if index == len(grid.rows) else 0)
        parts.append(_text(LEFT - 10, top + CELL_HEIGHT / 2 + 4, name, size=12, anchor="end"))
        for column, value in enumerate(row):
            text = show_value(value, is_perplexity=grid.is_perplexity)
            goodness = None if value is None else _judge(value, low, high, less_is_good=grid.is_perplexity)
            parts.append(_cell(LEFT + column * CELL_WIDTH, top, text, goodness))
    width = max(LEFT + len(grid.lengths) * CELL_WIDTH + MARGIN, 480)
    height = TOP + len(rows) * CELL_HEIGHT + 6 + MARGIN
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>", ""])


def _judge(value: float, low: float, high: float, *, less_is_good: bool) -> float:
    """0 bad to 1 good."""
    share = 1.0 if high == low and less_is_good else (value - low) / ((high - low) or 1.0)
    share = min(max(share, 0.0), 1.0)
    return 1.0 - share if less_is_good and high != low else share


def _cell(left: float, top: float, text: str, goodness: float | None) -> str:
    box = f'x="{left}" y="{top}" width="{CELL_WIDTH}" height="{CELL_HEIGHT}"'
    color = EMPTY if goodness is None else _mix(goodness)
    label = _text(left + CELL_WIDTH / 2, top + CELL_HEIGHT / 2 + 4, text, size=12, anchor="middle")
    return f'<rect {box} fill="{color}" stroke="white"/>{label}'


def _mix(goodness: float) -> str:
    start, stop, share = (BAD, MIDDLE, 2 * goodness) if goodness < 0.5 else (MIDDLE, GOOD, 2 * goodness - 1)
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(start, stop, strict=True))
    return f"#{red:02x}{green:02x}{blue:02x}"


def _text(x: float, y: float, text: str, *, size: int, anchor: str = "start", tip: str = "") -> str:
    title = f"<title>{escape(tip)}</title>" if tip else ""
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}">{title}{escape(text)}</text>'
