"""Several values of one name among other names' values; all of the name's are asked for (RULER's multi-value
retrieval, section 3)."""

from longctx.evaluation.case import Case, Cell, Material, Task
from longctx.evaluation.names import NUMBER, draw_names, draw_numbers
from longctx.evaluation.needles import ask_about, make_depths


def make_case(cell: Cell, material: Material) -> Case:
    """``eval.num_needles`` values and ``eval.num_distractors`` others, all anywhere."""
    wording, options = material.wording, material.options
    form, rng, haystack = wording.fact_values, cell.rng("values"), material.haystack
    num_values, count = options.num_needles, options.num_needles + options.num_distractors
    name, *other_names = draw_names(rng, 1 + options.num_distractors, haystack=haystack)
    values = draw_numbers(rng, count, num_digits=wording.num_digits, haystack=haystack)
    names = [name] * num_values + other_names
    told = [form.tell(*fact) for fact in zip(names, values, strict=True)]
    expected = tuple(values[:num_values])
    question, lead = form.question.format(name=name), form.lead.format(name=name)
    return ask_about(
        cell,
        material,
        list(zip(make_depths(cell, count), told, strict=True)),
        lambda text: Case(text + question, lead, expected, NUMBER, f" {', '.join(expected)}."),
    )


TASK = Task(make_case)
