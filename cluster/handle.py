"""How the router reaches a worker, whatever it runs on."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from cluster.messages import WorkerInfo


class WorkerHandle(Protocol):
    """One worker, here or in another process."""

    @property
    def name(self) -> str:
        """The worker's name."""
        ...

    @property
    def role(self) -> str:
        """``"prefill"`` or ``"decode"``."""
        ...

    @property
    def is_far(self) -> bool:
        """Whether calls cost enough that the router should have a connection of its own."""
        ...

    async def call(self, method: str, /, *args: Any) -> Any:
        """Call a coroutine method of the worker. Raises what it raised, ``WorkerLostError`` if it is gone."""
        ...

    async def end_process(self, info: WorkerInfo) -> None:
        """Kill the process that ``info`` is of, if it is there and can be reached; whoever owns it starts another."""
        ...


Roster = Callable[[], Awaitable[Sequence[WorkerHandle]]]  # the workers that there are now


class NamedWorker(Protocol):
    """A worker, or another rank of one."""

    name: str
    role: str


class LocalHandle:
    """A worker in this process."""

    def __init__(self, worker: NamedWorker) -> None:
        self._worker = worker

    @property
    def name(self) -> str:
        """The worker's name."""
        return self._worker.name

    @property
    def role(self) -> str:
        """The worker's role."""
        return self._worker.role

    @property
    def is_far(self) -> bool:
        """It is here."""
        return False

    async def call(self, method: str, /, *args: Any) -> Any:
        """Call it directly."""
        return await getattr(self._worker, method)(*args)

    async def end_process(self, info: WorkerInfo) -> None:
        """It is ours."""
