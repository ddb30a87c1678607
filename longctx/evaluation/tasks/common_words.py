"""The ten most common words of a numbered list (RULER's common words extraction, section 3).

Words are made of syllables instead of drawn from a list of English ones, and there is no worked example before the
question.
"""

from longctx.evaluation.case import Case, Cell, Material, Task
from longctx.evaluation.fitting import TooShortError, fit
from longctx.evaluation.names import WORD, draw_words

NUM_COMMON = 10
FREQUENCIES = ((30, 3), (10, 1))  # of a common word and of another; the first that fits is taken
MIN_OTHERS = 10
CHARS_PER_WORD = 11  # with its number


def make_case(cell: Cell, material: Material) -> Case:
    """As many other words as the length has room for, all shuffled."""
    for common, other in FREQUENCIES[:-1]:
        try:
            return _make_case(cell, material, common, other)
        except TooShortError:
            continue
    return _make_case(cell, material, *FREQUENCIES[-1])


def _make_case(cell: Cell, material: Material, common: int, other: int) -> Case:
    count = len(draw_words(cell.rng("words"), NUM_COMMON))

    def render(size: int) -> Case:
        words = draw_words(cell.rng("words"), count + MIN_OTHERS + size)
        shown = words[:NUM_COMMON] * common + words[NUM_COMMON:] * other
        cell.rng("order").shuffle(shown)
        expected = tuple(words[:NUM_COMMON])
        listed = " ".join(f"{number}. {word}" for number, word in enumerate(shown, start=1))
        return Case(
            "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
            f"that appear most often.\n\n{listed}\n\n"
            f"Question: What are the {NUM_COMMON} most common words in the above list?",
            f" Answer: The top {NUM_COMMON} words that appear most often in the list are:",
            expected,
            WORD,
            " " + " ".join(f"{number}. {word}" for number, word in enumerate(expected, start=1)),
        )

    first = int(cell.length * material.chars_per_token / CHARS_PER_WORD / other / 2)
    return fit(render, material, cell.length, first=first)


TASK = Task(make_case)
