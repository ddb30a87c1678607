"""How fast one machine computes prompts and tokens: what ``longctx bench`` measures and ``longctx plan cluster`` reads.

A step that computes prompt tokens and decodes takes the time of the prompt tokens, and what each decoding sequence adds
to a step; weights are read once. Between two measurements times are interpolated, and beyond the last ones continued.
"""

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from longctx.errors import ConfigError


@dataclass(frozen=True, slots=True)
class MachineProfile:
    """One machine, as a worker of one model."""

    name: str
    prompt_times: tuple[tuple[int, float], ...]  # (prompt tokens of a step, its seconds), from few to many
    token_times: tuple[tuple[int, float], ...]  # (sequences that decode, seconds of a step), from few to many
    kv_tokens: int  # that its KV pool holds
    prompt_context_s: float = 0.0  # seconds for each prompt token and each 1,000 tokens before it, besides
    token_context_s: float = 0.0  # seconds of a step for each 1,000 tokens of its sequences' contexts, besides
    overhead_s: float = 0.0  # seconds that router and endpoint add to the time of every token
    kv_bytes_per_token: int = 0
    num_layers: int = 1
    network_bytes_s: float = 1e12  # at which KV leaves it
    max_batch_tokens: int = 2048
    max_sequences: int = 128
    mixed_share: float = 0.25
    watts: float = 0.0
    cost_per_hour: float = 0.0
    source: str = ""  # who measured it, and how

    def prompt_time(self, num_tokens: float, num_before: float = 0.0) -> float:
        """Seconds of a step over so many prompt tokens, behind so many tokens of the same prompt."""
        pairs = num_tokens * (num_before + num_tokens / 2) / 1000
        return _interpolate(self.prompt_times, num_tokens) + self.prompt_context_s * pairs

    def token_time(self, num_sequences: float, num_context: float = 0.0) -> float:
        """Seconds of a step in which so many sequences decode, with so many tokens of context together."""
        return _interpolate(self.token_times, num_sequences) + self.token_context_s * num_context / 1000

    def mixed_time(self, num_tokens: float, num_sequences: float, num_context: float = 0.0) -> float:
        """Seconds of a step with both, apart from what prompt tokens read of their own prompt."""
        if not num_tokens:
            return self.token_time(num_sequences, num_context)
        added = self.token_time(num_sequences, num_context) - _interpolate(self.token_times, 0)
        return self.prompt_time(num_tokens) + max(0.0, added)


def load_profile(name: str, folder: Path) -> MachineProfile:
    """A profile by the name of one in ``folder``, or by a JSON file's path; raises ``ConfigError`` if it is neither."""
    path = folder / f"{name}.json"
    path = path if path.is_file() else Path(name)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        known = ", ".join(sorted(each.stem for each in folder.glob("*.json")))
        raise ConfigError(f"machine profile {name!r} is neither a file nor one of {known}") from None
    except ValueError as error:
        raise ConfigError(f"machine profile {path} is not JSON: {error}") from None
    return read_profile(content, str(path))


def read_profile(content: Any, origin: str) -> MachineProfile:
    """A profile from JSON's objects; raises ``ConfigError`` naming what is wrong."""
    names = {field.name for field in fields(MachineProfile)}
    if not isinstance(content, dict):
        raise ConfigError(f"machine profile {origin}: an object is expected")
    unknown = sorted(content.keys() - names)
    missing = sorted({"name", "prompt_times", "token_times", "kv_tokens"} - content.keys())
    if unknown or missing:
        raise ConfigError(f"machine profile {origin}: unknown {unknown}, missing {missing}; allowed: {sorted(names)}")
    tables = {
        name: _read_table(content[name], f"machine profile {origin}: {name}")
        for name in ("prompt_times", "token_times")
    }
    values: dict[str, Any] = content | tables
    return MachineProfile(**values)


def save_profile(profile: MachineProfile, path: Path) -> None:
    """Write the JSON that ``load_profile`` reads; raises ``OSError``."""
    path.write_text(json.dumps(asdict(profile), indent=1) + "\n", encoding="utf-8")


def _read_table(rows: Any, what: str) -> tuple[tuple[int, float], ...]:
    try:
        table = tuple((int(count), float(seconds)) for count, seconds in rows)
    except (TypeError, ValueError):
        raise ConfigError(f"{what} is not a list of [count, seconds]") from None
    counts = [count for count, _ in table]
    if len(table) < 2 or counts != sorted(set(counts)) or any(seconds <= 0 for _, seconds in table):
        raise ConfigError(f"{what}: at least two pairs are expected, counts rising, seconds above 0")
    return table


@lru_cache(maxsize=1 << 16)
def _interpolate(table: Sequence[tuple[int, float]], count: float) -> float:
    place = min(max(1, bisect_left(table, (count, 0.0))), len(table) - 1)
    (low, first), (high, last) = table[place - 1], table[place]
    return max(first * 0.1, first + (last - first) * (count - low) / (high - low))
