"""Several named values in the haystack, one of which is asked for (RULER's multi-key retrieval, section 3)."""

from collections.abc import Callable
from dataclasses import replace

from longctx.evaluation.case import Case, Cell, Material, Task
from longctx.evaluation.names import NUMBER, draw_names, draw_numbers
from longctx.evaluation.needles import ask_about, ask_one_text, make_depths


def make_case(cell: Cell, material: Material) -> Case:
    """The asked value stands at the cell's depth, ``eval.num_distractors`` others anywhere.

    With ``eval.share_text`` a value stands at each of ``eval.depths``, and the cell's depth says which is asked for.
    """
    wording, count = material.wording, 1 + material.options.num_distractors
    assert cell.depth is not None
    fixed = material.options.shared_depths
    source = replace(cell, depth=None) if fixed else cell
    rng, haystack = source.rng("values"), material.haystack
    names = draw_names(rng, count, haystack=haystack)
    values = draw_numbers(rng, count, num_digits=wording.num_digits, haystack=haystack)
    depths = [depth / 100 for depth in fixed or (cell.depth,)]
    depths += make_depths(source, count - len(depths))
    sentences = [
        (depth, wording.fact.tell(name, value)) for depth, name, value in zip(depths, names, values, strict=True)
    ]

    def ask(name: str, value: str) -> Callable[[str], Case]:
        question, lead = wording.fact.question.format(name=name), wording.fact.lead.format(name=name)
        return lambda text: Case(text + question, lead, (value,), NUMBER, f" {value}.")

    if not fixed:
        return ask_about(source, material, sentences, ask(names[0], values[0]))
    asked = [ask(name, value) for name, value in zip(names, values, strict=True)][: len(fixed)]
    return ask_one_text(source, material, sentences, asked, asked=fixed.index(cell.depth))


TASK = Task(make_case, has_depth=True)
