"""One five-digit pass key in the haystack (Mohtashami & Jaggi, "Landmark Attention", 2023, section 4.2)."""

from longctx.evaluation.case import Case, Cell, Material, Task
from longctx.evaluation.names import NUMBER, draw_numbers
from longctx.evaluation.needles import ask_about

NUM_DIGITS = 5


def make_case(cell: Cell, material: Material) -> Case:
    """The key stands at the cell's depth."""
    form = material.wording.pass_key
    (key,) = draw_numbers(cell.rng("values"), 1, num_digits=NUM_DIGITS, haystack=material.haystack)
    assert cell.depth is not None
    return ask_about(
        cell,
        material,
        [(cell.depth / 100, form.tell("", key))],
        lambda text: Case(text + form.question, form.lead, (key,), NUMBER, f" {key}."),
    )


TASK = Task(make_case, has_depth=True)
