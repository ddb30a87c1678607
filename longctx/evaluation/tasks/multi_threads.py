"""Several threads through a JSON object of UUIDs, all of whose last values are asked for (Needle Threading, section 3:
multi-threading)."""

from longctx.evaluation.case import Case, Cell, Material, Task
from longctx.evaluation.pairs import Pair, ask_about_pairs, make_thread, quote

INSTRUCTION = (
    "The specified keys each correspond to values in the JSON object below. However, the values might equal others "
    "keys in the JSON object. The value corresponding to each new key might also equal another key in the JSON "
    "object. This chain could continue beyond. Extract the final values in each the chain. If the value corresponding "
    "to the first key does not equal another key, then the final value is the value corresponding to the first key."
)


def make_case(cell: Cell, material: Material) -> Case:
    """``eval.num_threads`` threads of ``eval.thread_length`` pairs each stand anywhere."""
    options = material.options
    threads = [make_thread(cell, f"thread {index}", options.thread_length) for index in range(options.num_threads)]
    asked = tuple(thread[0][0] for thread in threads)
    return ask_about_pairs(
        cell,
        material,
        instruction=INSTRUCTION,
        question=f"Keys: {quote(asked)}\nCorresponding final values:",
        expected=tuple(thread[-1][1] for thread in threads),
        asked=asked,
        num_placed=options.num_threads * options.thread_length,
        place=lambda num_pairs: place_threads(cell, threads, num_pairs, direction=options.thread_direction),
    )


def place_threads(cell: Cell, threads: list[list[Pair]], num_pairs: int, *, direction: str) -> dict[int, Pair]:
    """The pairs of all threads by their index; forward, each pair stands after the one before it in its thread."""
    rng = cell.rng("places")
    places = rng.sample(range(num_pairs), sum(map(len, threads)))
    placed: dict[int, Pair] = {}
    for thread in threads:
        own, places = places[: len(thread)], places[len(thread) :]
        if direction != "random":
            own.sort(reverse=direction == "backward")
        placed |= dict(zip(own, thread, strict=True))
    return placed


TASK = Task(make_case)
