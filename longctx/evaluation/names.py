"""Random names, numbers and words, all different and found nowhere else in the text."""

import random
import string
import uuid
from collections.abc import Callable

from longctx.evaluation.haystack import Haystack

NUMBER = r"\d+"
UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
WORD = r"\b(?:[bdfgklmnprstvz][aeiou]){3}\b"  # what ``draw_words`` makes

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_NOUNS = (
    *("amber", "anchor", "basket", "bottle", "candle", "castle", "copper", "forest", "garden", "hammer"),
    *("mirror", "orange", "pepper", "planet", "purple", "river", "rocket", "silver", "tunnel", "walnut"),
)


def draw_numbers(rng: random.Random, count: int, *, num_digits: int, haystack: Haystack) -> list[str]:
    """Numbers that differ from each other and do not stand in the haystack."""
    low, high = 10 ** (num_digits - 1), 10**num_digits
    return _draw_different(lambda: str(rng.randrange(low, high)), count, haystack)


def draw_names(rng: random.Random, count: int, *, haystack: Haystack) -> list[str]:
    """Identifiers, as ``amber_kxqv``."""
    letters = string.ascii_lowercase
    return _draw_different(lambda: f"{rng.choice(_NOUNS)}_{''.join(rng.choices(letters, k=4))}", count, haystack)


def draw_words(rng: random.Random, count: int) -> list[str]:
    """Pronounceable words of three syllables; there are 343,000. Needs no word list, and no model has seen them."""
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(3))] = None
    return list(words)


def draw_uuid(rng: random.Random) -> str:
    """A version 4 UUID."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _draw_different(draw: Callable[[], str], count: int, haystack: Haystack) -> list[str]:
    values: dict[str, None] = {}
    while len(values) < count:
        value = draw()
        if not haystack.holds(value):
            values[value] = None
    return list(values)
