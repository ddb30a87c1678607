"""A worker in a process of its own, without Ray: calls travel pickled over a socket pair, and signals reach it."""

import asyncio
import os
import pickle
import signal
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from cluster.config import ServeConfig
from cluster.messages import WorkerInfo
from longctx.errors import WorkerLostError
from tests.fork_server import start_process

if TYPE_CHECKING:
    from tests.cluster.fault_points import FaultOrder

_SIZE = struct.Struct("<Q")


class ProcessHandle:
    """A ``WorkerHandle`` on a worker of another process."""

    is_far = True

    def __init__(self, name: str, role: str, config: ServeConfig, order: "FaultOrder | None" = None) -> None:
        self.name, self.role, self._config = name, role, config
        self._order = order  # of the first process; one that takes its place is not hit
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._num_calls = 0

    async def open(self) -> None:
        """Start the process; the worker in it loads nothing yet."""
        ours, theirs = socket.socketpair()
        with theirs:
            order, self._order = self._order, None
            self._process = start_process(_main, theirs, self.name, self.role, self._config, order)
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._reading = asyncio.create_task(self._read(reader))

    async def call(self, method: str, /, *args: Any) -> Any:
        """See ``WorkerHandle.call``."""
        if self._reading.done():
            raise WorkerLostError(f"{self.name} died")
        self._num_calls += 1
        number = self._num_calls
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        _send(self._writer, (number, method, args))
        try:
            return await answer
        finally:
            self._answers.pop(number, None)

    async def end_process(self, info: WorkerInfo) -> None:
        """What tests freeze, they thaw."""

    @property
    def pid(self) -> int | None:
        """Of the process as it is now."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether there is a process."""
        return self._process.is_alive()

    def kill(self) -> None:
        """SIGKILL."""
        self._signal(signal.SIGKILL)

    def freeze(self) -> None:
        """SIGSTOP."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    async def restart(self) -> None:
        """A new process in the place of the old one, as Ray makes it."""
        await self.close()
        await self.open()

    async def close(self) -> None:
        """Kill the process, whatever its state."""
        self.kill()
        await asyncio.to_thread(self._process.join)
        self._writer.close()
        await self._reading

    def _signal(self, number: int) -> None:
        if self._process.is_alive() and self._process.pid is not None:
            os.kill(self._process.pid, number)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                number, result, error = await _receive(reader)
                answer = self._answers.get(number)
                if answer is not None and not answer.done():
                    answer.set_exception(error) if error is not None else answer.set_result(result)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(WorkerLostError(f"{self.name} died"))


@asynccontextmanager
async def open_worker(
    name: str, role: str, config: ServeConfig, order: "FaultOrder | None" = None
) -> AsyncIterator[ProcessHandle]:
    """A worker's process, killed in the end; ``order``: what hits it before."""
    handle = ProcessHandle(name, role, config, order)
    await handle.open()
    try:
        yield handle
    finally:
        await handle.close()


def _main(sock: socket.socket, name: str, role: str, config: ServeConfig, order: "FaultOrder | None") -> None:
    asyncio.run(_serve(sock, name, role, config, order))


async def _serve(sock: socket.socket, name: str, role: str, config: ServeConfig, order: "FaultOrder | None") -> None:
    """Run calls, each as a task begun in the order of arrival, until the other end closes."""
    from cluster.serving_worker import ServingWorker
    from tests.cluster.fault_points import Partition, install

    partition = Partition()
    if order is not None:
        install(order, partition)
    worker = ServingWorker(name, role, config)
    reader, writer = await asyncio.open_connection(sock=sock)

    async def run(number: int, method: str, args: tuple[Any, ...]) -> None:
        await partition.wait_until_healed()
        try:
            answer = (number, await getattr(worker, method)(*args), None)
        except Exception as error:
            answer = (number, None, error)
        await partition.wait_until_healed()
        _send(writer, answer)

    tasks = set()
    with suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            task = asyncio.create_task(run(*await _receive(reader)))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
    await worker.close()


def _send(writer: asyncio.StreamWriter, message: object) -> None:
    data = pickle.dumps(message)
    writer.write(_SIZE.pack(len(data)) + data)


async def _receive(reader: asyncio.StreamReader) -> Any:
    (size,) = _SIZE.unpack(await reader.readexactly(_SIZE.size))
    return pickle.loads(await reader.readexactly(size))
