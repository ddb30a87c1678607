"""Several named values, several of which are asked for at once (RULER's multi-query retrieval, section 3)."""

from longctx.evaluation.case import Case, Cell, Material, Task
from longctx.evaluation.names import NUMBER, draw_names, draw_numbers
from longctx.evaluation.needles import ask_about, make_depths


def make_case(cell: Cell, material: Material) -> Case:
    """``eval.num_needles`` of ``eval.num_needles + eval.num_distractors`` values are asked for; all stand anywhere."""
    wording, options = material.wording, material.options
    form, rng, haystack = wording.fact_values, cell.rng("values"), material.haystack
    num_asked, count = options.num_needles, options.num_needles + options.num_distractors
    names = draw_names(rng, count, haystack=haystack)
    values = draw_numbers(rng, count, num_digits=wording.num_digits, haystack=haystack)
    told = [form.tell(*fact) for fact in zip(names, values, strict=True)]
    asked, expected = _list_names(names[:num_asked]), tuple(values[:num_asked])
    question, lead = form.question.format(name=asked), form.lead.format(name=asked)
    return ask_about(
        cell,
        material,
        list(zip(make_depths(cell, count), told, strict=True)),
        lambda text: Case(text + question, lead, expected, NUMBER, f" {', '.join(expected)}."),
    )


def _list_names(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


TASK = Task(make_case)
