"""A thread through a JSON object of UUIDs: each value is another key, and the last value is asked for (Needle
Threading, section 3: single threading)."""

from longctx.evaluation.case import Case, Cell, Material, Task
from longctx.evaluation.pairs import Pair, ask_about_pairs, make_thread

INSTRUCTION = (
    "The specified key corresponds to a value in the JSON object below. However, that value might equal another key "
    "in the JSON object. The value corresponding to this new key might also equal another key in the JSON object. "
    "This chain could continue beyond. Extract the final value in the chain. If the value corresponding to the first "
    "key does not equal another key, then the final value is the value corresponding to the first key."
)


def make_case(cell: Cell, material: Material) -> Case:
    """The last of ``eval.thread_length`` pairs stands at the cell's depth, or as near as the others leave it room."""
    options = material.options
    thread = make_thread(cell, "thread", options.thread_length)
    key, value = thread[0][0], thread[-1][1]
    return ask_about_pairs(
        cell,
        material,
        instruction=INSTRUCTION,
        question=f'Key: "{key}"\nCorresponding final value:',
        expected=(value,),
        asked=(key,),
        num_placed=len(thread),
        place=lambda num_pairs: place_thread(cell, thread, num_pairs, direction=options.thread_direction),
    )


def place_thread(cell: Cell, thread: list[Pair], num_pairs: int, *, direction: str) -> dict[int, Pair]:
    """The thread's pairs by their index: forward, each stands after the one before it."""
    assert cell.depth is not None
    rng, count = cell.rng("places"), len(thread) - 1
    last = round(cell.depth / 100 * (num_pairs - 1))
    if direction == "forward":
        last = max(last, count)
        places = sorted(rng.sample(range(last), count))
    elif direction == "backward":
        last = min(last, num_pairs - 1 - count)
        places = sorted(rng.sample(range(last + 1, num_pairs), count), reverse=True)
    else:
        places = rng.sample([place for place in range(num_pairs) if place != last], count)
    return dict(zip([*places, last], thread, strict=True))


TASK = Task(make_case, has_depth=True)
