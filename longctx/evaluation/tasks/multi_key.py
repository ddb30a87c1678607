"""Several named values in the haystack, one of which is asked for (RULER's multi-key retrieval, section 3)."""

from longctx.evaluation.case import Case, Cell, Material, Task
from longctx.evaluation.names import NUMBER, draw_names, draw_numbers
from longctx.evaluation.needles import ask_about, make_depths


def make_case(cell: Cell, material: Material) -> Case:
    """The asked value stands at the cell's depth, ``eval.num_distractors`` others anywhere."""
    wording, count = material.wording, material.options.num_distractors
    form, rng, haystack = wording.fact, cell.rng("values"), material.haystack
    name, *other_names = draw_names(rng, 1 + count, haystack=haystack)
    value, *others = draw_numbers(rng, 1 + count, num_digits=wording.num_digits, haystack=haystack)
    assert cell.depth is not None
    sentences = [(cell.depth / 100, form.tell(name, value))]
    sentences += [
        (depth, form.tell(*fact)) for depth, *fact in zip(make_depths(cell, count), other_names, others, strict=True)
    ]
    question, lead = form.question.format(name=name), form.lead.format(name=name)
    return ask_about(
        cell,
        material,
        sentences,
        lambda text: Case(text + question, lead, (value,), NUMBER, f" {value}."),
    )


TASK = Task(make_case, has_depth=True)
