"""Sentences hidden in a haystack, and a question about them: what the recall tasks share."""

import random
from collections.abc import Callable, Sequence

from longctx.evaluation.case import Case, Cell, Material
from longctx.evaluation.fitting import fit

MAX_SHIFT = 200  # characters that a sentence moves at most to stand between two lines or sentences


def hide(text: str, sentences: Sequence[tuple[float, str]], *, boundary: str, separator: str) -> str:
    """``text`` with each sentence at its depth (0 start, 1 end), moved to the nearest line or sentence boundary."""
    places = sorted(
        ((find_boundary(text, round(depth * len(text)), boundary), sentence) for depth, sentence in sentences),
        key=lambda place: place[0],
    )
    parts, position = [], 0
    for place, sentence in places:
        piece = text[position:place]
        is_open = (piece or text[:place])[-1:] not in ("", " ", "\n")
        parts += [piece, separator if is_open else "", sentence, separator]
        position = place
    return "".join([*parts, text[position:]])


def find_boundary(text: str, target: int, boundary: str) -> int:
    """The index after the boundary nearest to ``target``, or of the text's start or end."""
    if target in (0, len(text)):
        return target
    before = text.rfind(boundary, 0, target)
    after = text.find(boundary, target)
    found = [0 if before < 0 else before + len(boundary), len(text) if after < 0 else after + len(boundary)]
    nearest = min(found, key=lambda place: abs(place - target))
    if abs(nearest - target) <= MAX_SHIFT:
        return nearest
    space = text.find(" ", target, target + MAX_SHIFT)
    return target if space < 0 else space + 1


def make_depths(cell: Cell, count: int) -> list[float]:
    """Random depths, 0 to 1: of distractors, and of facts without a place of their own."""
    rng = cell.rng("depths")
    return [rng.random() for _ in range(count)]


def ask_about(
    cell: Cell,
    material: Material,
    sentences: Sequence[tuple[float, str]],
    make_case: Callable[[str], Case],
) -> Case:
    """The prompt that hides ``sentences`` in as much haystack as the cell's length has room for.

    Args:
        cell: which prompt.
        material: whose haystack and wording.
        sentences: with their depths.
        make_case: the case, given the text with the sentences in it.
    """
    haystack = material.haystack
    num_chars = int(cell.length * material.chars_per_token)
    read = haystack.open(cell.rng("haystack"), num_chars)

    def render(size: int) -> Case:
        text = hide(read(size), sentences, boundary=haystack.boundary, separator=haystack.separator)
        return make_case(f"{material.wording.preamble}{text.rstrip()}\n\n")

    return fit(render, material, cell.length, first=num_chars)


def ask_one_text(
    cell: Cell,
    material: Material,
    sentences: Sequence[tuple[float, str]],
    make_cases: Sequence[Callable[[str], Case]],
    *,
    asked: int,
) -> Case:
    """As ``ask_about``, with the same text whichever of ``make_cases`` is asked for: all of them fit."""
    longest = max(make_cases, key=lambda make: material.measure((case := make("")).prompt, case.lead))
    texts: dict[str, str] = {}

    def make_longest(text: str) -> Case:
        case = longest(text)
        texts[case.prompt] = text
        return case

    return make_cases[asked](texts[ask_about(cell, material, sentences, make_longest).prompt])


def spread(rng: random.Random, num_places: int, count: int) -> list[int]:
    """``count`` different places of ``num_places``, in order."""
    return sorted(rng.sample(range(num_places), count))
