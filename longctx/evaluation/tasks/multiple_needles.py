"""Several pairs of a JSON object of UUIDs are asked for (Needle Threading, section 3: multiple needles)."""

from longctx.evaluation.case import Case, Cell, Material, Task
from longctx.evaluation.names import draw_uuid
from longctx.evaluation.needles import spread
from longctx.evaluation.pairs import ask_about_pairs, quote


def make_case(cell: Cell, material: Material) -> Case:
    """``eval.num_needles`` pairs stand anywhere; their keys are asked for in another order."""
    rng, count = cell.rng("needles"), material.options.num_needles
    needles = [(draw_uuid(rng), draw_uuid(rng)) for _ in range(count)]
    asked = tuple(key for key, _ in rng.sample(needles, count))
    return ask_about_pairs(
        cell,
        material,
        instruction="Extract the values corresponding to the specified keys in the JSON object below.",
        question=f"Keys: {quote(asked)}\nCorresponding values:",
        expected=tuple(value for _, value in needles),
        asked=asked,
        num_placed=count,
        place=lambda num_pairs: dict(zip(spread(cell.rng("places"), num_pairs, count), needles, strict=True)),
    )


TASK = Task(make_case)
