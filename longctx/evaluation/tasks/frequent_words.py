"""The three most frequent words of a coded text whose frequencies follow a zeta distribution (RULER's frequent words
extraction, section 3, alpha = 2); the most frequent of all is "....", which does not count."""

from longctx.evaluation.case import Case, Cell, Material, Task
from longctx.evaluation.fitting import fit
from longctx.evaluation.names import WORD, draw_words

NUM_ASKED = 3
ALPHA = 2.0
ZETA = 1.6449340668  # of ALPHA
NUM_KINDS = 200  # of words; rarer ones come up in no text that fits anywhere
NOISE = "...."
MIN_WORDS = 80  # enough for the third and the fourth word to differ in number
CHARS_PER_WORD = 7


def make_case(cell: Cell, material: Material) -> Case:
    """As many words as the length has room for."""
    words = draw_words(cell.rng("words"), NUM_KINDS)
    expected = tuple(words[:NUM_ASKED])

    def render(size: int) -> Case:
        counts = count_words(MIN_WORDS + size)
        shown = [word for word, count in zip([NOISE, *words], counts, strict=False) for _ in range(count)]
        cell.rng("order").shuffle(shown)
        return Case(
            "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
            f"appeared coded words.\n\n{' '.join(shown)}\n\n"
            "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
            "frequently appeared words in the above coded text?",
            " Answer: According to the coded text above, the three most frequently appeared words are:",
            expected,
            WORD,
            " " + ", ".join(expected),
        )

    first = int(cell.length * material.chars_per_token / CHARS_PER_WORD / 2)
    return fit(render, material, cell.length, first=first)


def count_words(num_words: int) -> list[int]:
    """How often the words of each rank come up, the noise first; at least once each, while there are words left."""
    counts = [max(1, int(num_words * rank**-ALPHA / ZETA)) for rank in range(1, NUM_KINDS + 2)]
    total = 0
    for index, count in enumerate(counts):
        total += count
        if total >= num_words:
            return counts[: index + 1]
    return counts


TASK = Task(make_case)
