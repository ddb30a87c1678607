"""A JSON object of UUID pairs, some of which are asked for: what the Needle Threading tasks share.

Roberts, Han & Albanie, "Needle Threading: Can LLMs Follow Threads through Near-Million-Scale Haystacks?" (2024, arXiv
2411.05000), section 3 and appendix.
"""

import itertools
from collections.abc import Callable

from longctx.evaluation.case import Case, Cell, Material
from longctx.evaluation.fitting import fit
from longctx.evaluation.names import UUID, draw_uuid

Pair = tuple[str, str]
CHARS_PER_PAIR = 80
THREAD_DIRECTIONS = ("forward", "backward", "random")


def fill_object(cell: Cell, placed: dict[int, Pair], num_pairs: int) -> str:
    """A JSON object of ``num_pairs`` pairs: those placed by their index, the others random."""
    rng = cell.rng("pairs")
    pairs = [placed.get(index) or (draw_uuid(rng), draw_uuid(rng)) for index in range(num_pairs)]
    return "{" + ",\n".join(f'"{key}": "{value}"' for key, value in pairs) + "}"


def ask_about_pairs(
    cell: Cell,
    material: Material,
    *,
    instruction: str,
    question: str,
    expected: tuple[str, ...],
    asked: tuple[str, ...],
    num_placed: int,
    place: Callable[[int], dict[int, Pair]],
) -> Case:
    """The prompt over as many pairs as the cell's length has room for.

    Args:
        cell: which prompt.
        material: measures tokens.
        instruction: before the object.
        question: after it; ends where the answer begins.
        expected: values to be answered.
        asked: keys that stand in the question.
        num_placed: pairs that ``place`` places.
        place: the placed pairs by their index, given the number of pairs.
    """

    def render(size: int) -> Case:
        num_pairs = num_placed + size
        text = fill_object(cell, place(num_pairs), num_pairs)
        return Case(
            prompt=f"{instruction}\n\n{text}\n\n{question}",
            lead="",
            expected=expected,
            pattern=UUID,
            ending=" " + ", ".join(f'"{value}"' for value in expected),
            ignored=asked,
        )

    first = int(cell.length * material.chars_per_token / CHARS_PER_PAIR / 2)
    return fit(render, material, cell.length, first=first)


def make_thread(cell: Cell, purpose: str, length: int) -> list[Pair]:
    """A thread of ``length`` pairs: each value is the next pair's key."""
    rng = cell.rng(purpose)
    links = [draw_uuid(rng) for _ in range(length + 1)]
    return list(itertools.pairwise(links))


def quote(keys: tuple[str, ...]) -> str:
    """Keys as a list in a question."""
    return "[" + ", ".join(f'"{key}"' for key in keys) + "]"
