"""What one API key may use: requests at one time, requests and tokens a minute.

A token bucket holds a minute's worth and fills evenly (RFC 2697's, with one colour): so many at once, then so many a
minute. Times are monotonic. Limits live in one endpoint's process and begin anew with it.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence

from cluster.config import ServerConfig
from cluster.openai_errors import ApiError, busy
from longctx.errors import RequestError
from longctx.messages import GenerationRequest

MINUTE_S = 60.0
MAX_RETRY_AFTER_S = 60.0
NUM_REMEMBERED = 256  # last requests whose ends are counted
LIMITED = "rate_limit_exceeded"  # an error's code, as in the OpenAI API

Clock = Callable[[], float]
Headers = list[tuple[bytes, bytes]]


class TokenBucket:
    """So many a minute, and a minute's worth at most at once.

    Args:
        per_minute: at least 1.
        clock: seconds that only grow.
    """

    def __init__(self, per_minute: int, clock: Clock) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level, self._filled_at = float(per_minute), clock()

    @property
    def level(self) -> float:
        """What is there now; below zero after more was taken than was there."""
        now = self._clock()
        gained = (now - self._filled_at) * self.per_minute / MINUTE_S
        self._level, self._filled_at = min(self.per_minute, self._level + gained), now
        return self._level

    def wait_s(self, amount: float) -> float:
        """Seconds until ``amount`` is there, but for rounding; 0: it is."""
        return max(0.0, round((amount - self.level) * MINUTE_S / self.per_minute, 6))

    def take(self, amount: float) -> None:
        """Use ``amount``, whether it is there or not; below zero gives back."""
        self._level = min(self.per_minute, self.level - amount)


class Places:
    """So many requests at one time, and how fast they end.

    Args:
        limit: of requests; 0: none.
        clock: seconds that only grow.
        on_change: called with the number that is held.
    """

    def __init__(self, limit: int, clock: Clock, *, on_change: Callable[[int], None] | None = None) -> None:
        self.limit = self.most = limit  # ``cluster/slo_limit.py`` lowers the first
        self.num_held = 0
        self.was_full = False  # somebody was refused; for whoever sets it back
        self._clock, self._on_change = clock, on_change
        self._ends: deque[float] = deque(maxlen=NUM_REMEMBERED)
        self._busy_since = clock()

    def has_room(self, count: int, *, own: int = 0) -> bool:
        """Whether ``count`` more may be held by somebody who has ``own``; alone, up to ``most``: they may need them
        together.
        """
        limit = self.most if self.num_held == own else self.limit
        has_room = not limit or self.num_held + count <= limit
        self.was_full |= not has_room
        return has_room

    def take(self, count: int) -> None:
        """Hold ``count`` more."""
        if not self.num_held:
            self._busy_since = self._clock()
            self._ends.clear()
        self.num_held += count
        self._tell()

    def give_back(self, count: int, *, is_end: bool) -> None:
        """Hold ``count`` less; ``is_end``: they were served, and say how fast that goes."""
        self.num_held -= count
        if is_end:
            self._ends.extend([self._clock()] * count)
        self._tell()

    def retry_after_s(self, count: int = 1) -> float:
        """Seconds in which ``count`` places probably become free, as they did in the last minute; 1 to 60."""
        now = self._clock()
        while self._ends and self._ends[0] < now - MINUTE_S:
            self._ends.popleft()
        since = max(self._busy_since, now - MINUTE_S)
        if len(self._ends) == NUM_REMEMBERED:
            since = max(since, self._ends[0])
        estimate = count * (now - since) / max(1, len(self._ends))
        return min(MAX_RETRY_AFTER_S, max(1.0, estimate))

    def _tell(self) -> None:
        if self._on_change is not None:
            self._on_change(self.num_held)


class Tenant:
    """Whoever has one API key; without keys, all clients together under the name "".

    Args:
        name: of the key.
        server: limits.
        is_apart: its prefixes are found by nobody else.
        clock: seconds that only grow.
    """

    def __init__(self, name: str, server: ServerConfig, *, is_apart: bool = False, clock: Clock) -> None:
        self.name = name
        self.places = Places(server.key_max_requests, clock)
        self.requests = _make_bucket(server.key_requests_per_minute, clock)
        self.tokens = _make_bucket(server.key_tokens_per_minute, clock)
        self._is_apart = is_apart

    def __str__(self) -> str:
        return f"key {self.name!r}" if self.name else "all clients together"

    def salt(self, cache_salt: str) -> str:
        """What keeps its prefixes from others'. No name has a NUL, so no other tenant's salt is the same."""
        return f"{self.name}\0{cache_salt}" if self._is_apart else cache_salt

    @property
    def has_buckets(self) -> bool:
        """Whether there is anything to say in ``headers``."""
        return self.requests is not None or self.tokens is not None

    def headers(self) -> Headers:
        """``x-ratelimit-*`` of the OpenAI API, now."""
        buckets = (("requests", self.requests), ("tokens", self.tokens))
        return [
            (f"x-ratelimit-{field}-{what}".encode(), value.encode())
            for what, bucket in buckets
            if bucket is not None
            for field, value in (
                ("limit", str(bucket.per_minute)),
                ("remaining", str(max(0, math.floor(bucket.level)))),
                ("reset", _duration(bucket.wait_s(bucket.per_minute))),
            )
        ]

    def take_requests(self, count: int) -> None:
        """Hold ``count`` places and count as many requests, or raise ``ApiError`` 429 and take nothing."""
        places, bucket = self.places, self.requests
        if not places.has_room(count):
            text = f"{self} has {places.num_held} requests served or waiting; {places.limit} may be"
            wait_s = places.retry_after_s(places.num_held + count - places.limit)
            raise over_limit(f"{text} (server.key_max_requests)", retry_after_s=wait_s)
        if bucket is not None:
            if wait_s := bucket.wait_s(count):
                text = f"{self} may send {bucket.per_minute} requests a minute (server.key_requests_per_minute)"
                raise over_limit(text, retry_after_s=wait_s)
            bucket.take(count)
        places.take(count)

    def give_back_requests(self, count: int) -> None:
        """So many were refused after all. Their places are given back apart."""
        if self.requests is not None:
            self.requests.take(-count)

    def take_tokens(self, requests: Sequence[GenerationRequest], *, max_context: int) -> int:
        """Use prompt tokens and those asked for; returns how many.

        Raises ``ApiError`` 429, or ``RequestError`` if so many can never be there; then nothing is used.
        """
        bucket = self.tokens
        if bucket is None:
            return 0
        amount = count_tokens(requests, max_context=max_context, most=bucket.per_minute)
        if amount > bucket.per_minute:
            text = (
                f"the prompt's tokens and those asked for are {amount}; {self} may use {bucket.per_minute} a minute "
                "(server.key_tokens_per_minute)"
            )
            raise RequestError(text, param="prompt", code="token_limit_exceeded")
        if wait_s := bucket.wait_s(amount):
            text = f"{self} may use {bucket.per_minute} tokens a minute; this takes {amount}"
            raise over_limit(f"{text} (server.key_tokens_per_minute)", retry_after_s=wait_s)
        bucket.take(amount)
        return amount


class Tenants:
    """Every tenant that asked since the start, by name.

    Args:
        server: limits.
        has_keys: clients have keys, and so secrets from each other.
        clock: seconds that only grow.
    """

    def __init__(self, server: ServerConfig, *, has_keys: bool, clock: Clock = time.monotonic) -> None:
        self._server, self._clock = server, clock
        # Also with one key: the next to come would else find what the first one's prompts left behind.
        self._is_apart = has_keys and not server.share_prefix_cache
        self._tenants: dict[str, Tenant] = {}

    def get(self, name: str) -> Tenant:
        """The tenant of this name."""
        if name not in self._tenants:
            self._tenants[name] = Tenant(name, self._server, is_apart=self._is_apart, clock=self._clock)
        return self._tenants[name]


def over_limit(message: str, *, retry_after_s: float) -> ApiError:
    """429 for one tenant alone."""
    return busy(message, code=LIMITED, retry_after_s=retry_after_s)


def count_tokens(requests: Sequence[GenerationRequest], *, max_context: int, most: int) -> int:
    """Prompt tokens and tokens asked for. Requests that ask for all there is room for ask for what ``most`` leaves."""
    num_prompt = sum(len(request.prompt_token_ids) for request in requests)
    num_asked, is_open = 0, False
    for request in requests:
        room = max_context - len(request.prompt_token_ids)
        is_open = is_open or request.sampling.max_tokens is None
        num_asked += request.sampling.n * min(room, request.sampling.max_tokens or room)
    return num_prompt + (max(1, min(num_asked, most - num_prompt)) if is_open else num_asked)


def _make_bucket(per_minute: int, clock: Clock) -> TokenBucket | None:
    return TokenBucket(per_minute, clock) if per_minute else None


def _duration(seconds: float) -> str:
    """As the OpenAI API writes it: ``1.5s``, ``6m0s``."""
    minutes, rest = divmod(seconds, MINUTE_S)
    text = f"{rest:.3f}".rstrip("0").rstrip(".") + "s"
    return f"{minutes:.0f}m{text}" if minutes else text
