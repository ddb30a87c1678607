"""Chains of assignments hidden in the haystack; all variables of one chain are asked for (RULER's multi-hop tracing,
section 3)."""

import itertools
import random
import string

from longctx.evaluation.case import Case, Cell, Material, Task
from longctx.evaluation.names import draw_numbers
from longctx.evaluation.needles import ask_about, make_depths

VARIABLE = r"\b[A-Z]{5}\b"
NUM_DIGITS = 5


def make_case(cell: Cell, material: Material) -> Case:
    """``eval.num_chains`` chains of ``eval.thread_length`` copies each; the first chain's value is asked for."""
    options = material.options
    num_variables = options.thread_length + 1
    rng = cell.rng("values")
    values = draw_numbers(rng, options.num_chains, num_digits=NUM_DIGITS, haystack=material.haystack)
    names = _draw_variables(rng, options.num_chains * num_variables)
    chains = [names[start : start + num_variables] for start in range(0, len(names), num_variables)]
    depths = make_depths(cell, len(names))
    sentences = []
    for index, (chain, value) in enumerate(zip(chains, values, strict=True)):
        own = sorted(depths[index * num_variables : (index + 1) * num_variables])
        sentences += zip(own, _assign(chain, value), strict=True)
    question = f"Question: Find all variables that are assigned the value {values[0]} in the text above."
    lead = (
        f" Answer: According to the chain(s) of variable assignment in the text above, {num_variables} variables are "
        f"assigned the value {values[0]}, they are:"
    )
    expected = tuple(chains[0])
    return ask_about(
        cell,
        material,
        sentences,
        lambda text: Case(
            f"Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{text}{question}",
            lead,
            expected,
            VARIABLE,
            " " + ", ".join(expected),
        ),
    )


def _assign(chain: list[str], value: str) -> list[str]:
    copies = [f"VAR {name} = VAR {source}" for source, name in itertools.pairwise(chain)]
    return [f"VAR {chain[0]} = {value}", *copies]


def _draw_variables(rng: random.Random, count: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choices(string.ascii_uppercase, k=5))] = None
    return list(names)


TASK = Task(make_case)
