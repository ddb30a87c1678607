"""The runs of a sweep: every combination of the values of ``key=A,B``, as Hydra's multirun has them."""

from dataclasses import dataclass
from itertools import product

from longctx.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Run:
    """One combination."""

    swept: tuple[str, ...]  # the overrides that tell it from the others
    overrides: list[str]  # all


def expand_sweep(overrides: list[str]) -> list[Run]:
    """Every combination, the last key's values varying fastest.

    Raises ``ConfigError`` if no key has several values, or a sweep is none that can be listed.
    """
    choices = [list_values(text) for text in overrides]
    if all(len(values) == 1 for values in choices):
        raise ConfigError("-m is for a key with several values, as optimizer.lr=1e-4,2e-4; there is none")
    is_swept = [len(values) > 1 for values in choices]
    return [
        Run(tuple(text for text, swept in zip(combination, is_swept, strict=True) if swept), list(combination))
        for combination in product(*choices)
    ]


def list_values(text: str) -> list[str]:
    """The overrides that one stands for; one that cannot be parsed is told later, by who composes."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        return [text]
    if not override.is_sweep_override():
        return [text]
    if not override.is_discrete_sweep():
        raise ConfigError(f"{text!r} is not allowed: list the values, as key=A,B or key=range(1,4)")
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
