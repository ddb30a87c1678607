"""The values of all keys that hold a certain character (Needle Threading, section 3: conditional needles).

The character, ``*``, stands in no UUID, so that exactly the needles' keys hold it.
"""

from longctx.evaluation.case import Case, Cell, Material, Task
from longctx.evaluation.names import draw_uuid
from longctx.evaluation.needles import spread
from longctx.evaluation.pairs import ask_about_pairs

MARK = "*"


def make_case(cell: Cell, material: Material) -> Case:
    """``eval.num_needles`` pairs whose keys hold the mark stand anywhere."""
    rng, count = cell.rng("needles"), material.options.num_needles
    needles = []
    for _ in range(count):
        key, place = draw_uuid(rng), rng.randrange(8)
        needles.append((key[:place] + MARK + key[place + 1 :], draw_uuid(rng)))
    return ask_about_pairs(
        cell,
        material,
        instruction=f'Extract the values corresponding to the keys that contain the character "{MARK}" in the JSON '
        "object below.",
        question="Corresponding values:",
        expected=tuple(value for _, value in needles),
        asked=(),
        num_placed=count,
        place=lambda num_pairs: dict(zip(spread(cell.rng("places"), num_pairs, count), needles, strict=True)),
    )


TASK = Task(make_case)
