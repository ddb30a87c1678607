"""The requests that wait at the router for a place: in which order, how many, and for which pool."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from cluster.peer import Flight
from cluster.serving import QueueStats


@dataclass(slots=True, eq=False)
class Turn:
    """Requests that wait for the same, first come, first served: who holds ``lock`` is placed next."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    flights: set[Flight] = field(default_factory=set)
    lacks: str = ""  # the role of the workers that had no room for the first of them; empty: there was room

    @contextmanager
    def join(self, flight: Flight) -> Iterator[None]:
        """Wait in it, until the block ends."""
        self.flights.add(flight)
        try:
            yield
        finally:
            self.flights.discard(flight)


class WaitingRoom:
    """Every request without a place."""

    def __init__(self) -> None:
        self._turns: dict[tuple[bool, bool], Turn] = {}

    def __len__(self) -> int:
        return sum(len(turn.flights) for turn in self._turns.values())

    def turn(self, flight: Flight, *, is_long: bool) -> Turn:
        """Whom a request waits with: long prompts wait longer, and not before short ones."""
        return self._turns.setdefault((flight.transfers, flight.transfers and is_long), Turn())

    def describe(self) -> QueueStats:
        """How many wait, and for which pool."""
        waiting = {
            role: [flight for turn in self._turns.values() if turn.lacks == role for flight in turn.flights]
            for role in ("prefill", "decode")
        }
        tokens = sum(flight.num_tokens for flight in waiting["prefill"])
        return QueueStats(len(self), len(waiting["prefill"]), len(waiting["decode"]), tokens)
