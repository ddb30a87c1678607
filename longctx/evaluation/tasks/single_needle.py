"""One pair of a JSON object of UUIDs is asked for (Needle Threading, section 3: single needle)."""

from longctx.evaluation.case import Case, Cell, Material, Task
from longctx.evaluation.names import draw_uuid
from longctx.evaluation.pairs import ask_about_pairs


def make_case(cell: Cell, material: Material) -> Case:
    """The pair stands at the cell's depth."""
    rng = cell.rng("needles")
    key, value = draw_uuid(rng), draw_uuid(rng)
    assert cell.depth is not None
    share = cell.depth / 100
    return ask_about_pairs(
        cell,
        material,
        instruction="Extract the value corresponding to the specified key in the JSON object below.",
        question=f'Key: "{key}"\nCorresponding value:',
        expected=(value,),
        asked=(key,),
        num_placed=1,
        place=lambda num_pairs: {round(share * (num_pairs - 1)): (key, value)},
    )


TASK = Task(make_case, has_depth=True)
