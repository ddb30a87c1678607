"""Deltas between one producer and one consumer on an event loop, merged while the consumer is behind.

What a slow reader has not taken yet is one delta per sequence, however many tokens it holds, and nobody waits for it.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import replace

from longctx.messages import OutputDelta

MERGE_ABOVE = 64  # pending deltas


class DeltaBuffer:
    """Output of one or several requests that was not consumed yet."""

    def __init__(self) -> None:
        self._pending: list[OutputDelta] = []
        self._merge_above = MERGE_ABOVE
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, deltas: Iterable[OutputDelta]) -> None:
        """Add deltas; never waits."""
        self._pending.extend(deltas)
        if len(self._pending) > self._merge_above:
            self._pending = merge_deltas(self._pending)
            self._merge_above = max(MERGE_ABOVE, 2 * len(self._pending))
        self._wake()

    def fail(self, error: BaseException) -> None:
        """Make ``take`` raise ``error``, also before what is pending: the request is lost either way."""
        self._error = self._error or error
        self._wake()

    async def take(self, timeout_s: float | None = None) -> list[OutputDelta]:
        """Everything pending, at least one delta; empty if none came in ``timeout_s`` seconds."""
        if not self._pending and not self._error and not await self._wait(timeout_s):
            return []
        if self._error:
            raise self._error
        pending, self._pending = self._pending, []
        return merge_deltas(pending) if len(pending) > 1 else pending

    async def _wait(self, timeout_s: float | None) -> bool:
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        timer = loop.call_later(timeout_s, self._wake) if timeout_s is not None else None
        try:
            await self._waiter
        finally:
            self._waiter = None
            if timer:
                timer.cancel()
        return bool(self._pending or self._error)

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)


def merge_deltas(deltas: list[OutputDelta]) -> list[OutputDelta]:
    """One delta for each sequence, in order of first appearance."""
    groups: dict[tuple[str, int], list[OutputDelta]] = {}
    for delta in deltas:
        groups.setdefault((delta.request_id, delta.index), []).append(delta)
    return [group[0] if len(group) == 1 else _join(group) for group in groups.values()]


def _join(group: list[OutputDelta]) -> OutputDelta:
    """The last delta says how the sequence ended; counts are given on some deltas only."""
    return replace(
        group[-1],
        token_ids=tuple(token_id for delta in group for token_id in delta.token_ids),
        text="".join(delta.text for delta in group),
        logprobs=tuple(logprob for delta in group for logprob in delta.logprobs),
        num_prompt_tokens=max(delta.num_prompt_tokens for delta in group),
        num_cached_tokens=max(delta.num_cached_tokens for delta in group),
    )
