"""Makes a prompt as long as was asked for: never longer, and as little shorter as its parts allow."""

from collections.abc import Callable

from longctx.evaluation.case import Case, Material

TOLERANCE = 256  # a prompt may miss its length by one token in so many
MAX_ROUNDS = 24  # a straight line through two sizes gets there in three or four


class TooShortError(ValueError):
    """A prompt of this task needs more tokens."""


def fit(render: Callable[[int], Case], material: Material, length: int, *, first: int) -> Case:
    """The largest ``render(size)`` of at most ``length`` tokens, to within the tolerance.

    Args:
        render: a prompt with ``size`` units of filling, a pure function; more units, more tokens.
        material: measures tokens.
        length: tokens at most.
        first: units to try first.

    Raises:
        TooShortError: if the prompt without any filling is longer than that.
    """
    length = min(length, material.max_prompt or length)
    best = render(0)
    low, low_tokens = 0, material.measure(best.prompt, best.lead)
    if low_tokens > length:
        raise TooShortError(f"its shortest prompt has {low_tokens} tokens")
    aim, enough = length - length // (2 * TOLERANCE), length - length // TOLERANCE
    high, size = None, max(first, 1)
    for _ in range(MAX_ROUNDS):
        case = render(size)
        num_tokens = material.measure(case.prompt, case.lead)
        rate = max((num_tokens - low_tokens) / (size - low), 1e-6)  # tokens of a unit
        wanted = low + (aim - low_tokens) / rate
        if num_tokens <= length:
            best, low, low_tokens = case, size, num_tokens
        else:
            high = size
        if low_tokens >= enough or (high is not None and high - low <= 1):
            break
        size = _step_inside(round(wanted), low, high)
    return best


def _step_inside(wanted: int, low: int, high: int | None) -> int:
    """``wanted``, moved into what is left between ``low`` and ``high``, both excluded."""
    if high is None:
        return min(max(wanted, low + 1), 8 * low + 8)
    if low < wanted < high:
        return wanted
    return (low + high) // 2
