"""The other ranks of a worker, as its rank 0 knows them: started together, polled, and lost together."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cluster.config import ClusterConfig
from cluster.handle import WorkerHandle
from cluster.messages import RankReport, RankStart
from longctx.errors import ConfigError, WorkerLostError
from parallel.gloo_group import GlooGroup, open_meeting
from parallel.links import LinkModel, load_links

logger = logging.getLogger(__name__)

T = TypeVar("T")


class RankPeers:
    """Ranks 1 and up of one worker.

    Args:
        handles: theirs, in rank order; empty for a worker of one rank.
        config: timeouts, and where the link model is.
    """

    def __init__(self, handles: Sequence[WorkerHandle], config: ClusterConfig) -> None:
        self._handles, self._config = list(handles), config
        self._shipped = [0] * len(self._handles)
        self._tasks: list[asyncio.Task[None]] = []

    def __bool__(self) -> bool:
        return bool(self._handles)

    @property
    def sp_degree(self) -> int:
        """Ranks in all, rank 0 among them."""
        return 1 + len(self._handles)

    @property
    def bytes_shipped(self) -> int:
        """KV bytes that they have sent to other workers."""
        return sum(self._shipped)

    def load_links(self) -> LinkModel:
        """What plans are weighed by. Raises ``ConfigError`` if the file is not one."""
        if self._config.links_file is None:
            return LinkModel()
        try:
            return load_links(Path(self._config.links_file))
        except ValueError as error:
            raise ConfigError(f"cluster.links_file: {error}") from None

    async def start(
        self, address: str, links: LinkModel, build: Callable[[Callable[[], GlooGroup]], Coroutine[Any, Any, T]]
    ) -> tuple[T, list[str]]:
        """What ``build`` makes of rank 0's side while the others start, and the incarnations of these.

        Raises what went wrong first, on whichever rank.

        Args:
            address: of this node.
            links: what plans are weighed by.
            build: is given a function that joins the group, which blocks until all have come.
        """
        timeout_s = self._config.start_timeout_s
        meeting = await asyncio.to_thread(open_meeting, address, timeout_s=timeout_s)

        def join() -> GlooGroup:
            return GlooGroup(0, self.sp_degree, meeting=meeting, address=address, timeout_s=timeout_s)

        place = (address, meeting.port)
        own = asyncio.ensure_future(build(join))
        others = [
            asyncio.ensure_future(handle.call("start", RankStart(rank, self.sp_degree, place, links)))
            for rank, handle in enumerate(self._handles, start=1)
        ]
        done, pending = await asyncio.wait({own, *others}, return_when=asyncio.FIRST_EXCEPTION)
        failures = [error for error in (task.exception() for task in done) if error is not None]
        if failures:
            for task in pending:
                task.cancel()
            # A rank that does not come makes the others' waits fail, too: its own words say more.
            raise next((each for each in failures if not isinstance(each, RuntimeError)), failures[0])
        return own.result(), [task.result() for task in others]

    def follow(
        self,
        incarnations: Sequence[str],
        *,
        on_arrival: Callable[[int, str, bytes | None, str], None],
        on_lost: Callable[[str], None],
    ) -> None:
        """Poll them from now on: ``on_arrival`` gets (rank, request id, payload or None, reason), ``on_lost`` why."""
        self._tasks = [
            asyncio.ensure_future(self._poll(index, incarnation, on_arrival, on_lost))
            for index, incarnation in enumerate(incarnations)
        ]

    async def call_one(self, rank: int, method: str, *args: Any) -> Any:
        """What one of them answers."""
        async with asyncio.timeout(self._config.worker_timeout_s):
            return await self._handles[rank - 1].call(method, *args)

    async def call_all(self, method: str, *args: Any) -> list[Any]:
        """What each answers, in rank order; raises what one of them raised, ``TimeoutError`` if one does not."""
        calls = [handle.call(method, *args) for handle in self._handles]
        async with asyncio.timeout(self._config.worker_timeout_s):
            return await asyncio.gather(*calls)

    async def unfollow(self) -> None:
        """Poll them no more: what they say from now on is not news."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def close(self) -> None:
        """Let them go; a lost one is let be."""
        calls = [handle.call("close") for handle in self._handles]
        try:
            async with asyncio.timeout(self._config.worker_timeout_s):
                results = await asyncio.gather(*calls, return_exceptions=True)
        except TimeoutError:
            results = [TimeoutError("it did not answer")]
        for result in results:
            if isinstance(result, BaseException):
                logger.warning("a rank did not close: %s", result)

    async def _poll(
        self,
        index: int,
        incarnation: str,
        on_arrival: Callable[[int, str, bytes | None, str], None],
        on_lost: Callable[[str], None],
    ) -> None:
        handle, config = self._handles[index], self._config
        timeout_s = config.heartbeat_s + config.worker_timeout_s
        try:
            while True:
                async with asyncio.timeout(timeout_s):
                    report: RankReport = await handle.call("poll", config.heartbeat_s)
                if report.incarnation != incarnation:
                    raise WorkerLostError("it was restarted")
                self._shipped[index] = report.bytes_shipped
                for request_id, payload, reason in report.arrivals:
                    on_arrival(1 + index, request_id, payload, reason)
        except asyncio.CancelledError:
            raise
        except TimeoutError:
            on_lost(f"{handle.name} gave no sign of life for {timeout_s:g} s")
        except Exception as error:  # noqa: BLE001 - whatever it is, the group cannot go on
            on_lost(f"{handle.name}: {error}")
