"""A connection between the router and one worker: by Ray, a call or a token costs each end a millisecond and more.

    router                                  worker
      |  -- listen(session), by Ray ------>   it listens from now on; the answer has the address and a key
      |  -- connects ------------------->
      |  <------------------ nonce
      |  nonce, HMAC ------------------->     nobody else has the key, and it opens one connection
      |  calls ------------------------->
      |  <-------- reports, answers           reports as they come, and every ``heartbeat_s``

Each message is signed with a key of the connection and its direction, and the signature covers its number: none can be
left out, repeated or come from elsewhere. What is signed is unpickled, as what comes by Ray is; nothing else is looked
at. Nothing is encrypted, unless ``transport.tls_*`` say so, as for KV.
"""

import asyncio
import hmac
import logging
import pickle
import secrets
import ssl
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from cluster.messages import LineAddress, WorkerReport
from longctx.errors import LongctxError, WorkerLostError

logger = logging.getLogger(__name__)

CALLS = frozenset({"admit", "prefill", "compute_here", "cancel"})  # what the router asks while requests run
GREETING = b"longctx worker 1"
NONCE_BYTES, KEY_BYTES, MAC_BYTES = 16, 32, 32
MAX_MESSAGE_BYTES = 1 << 28
MAX_STRANGERS = 32  # connections at a time that have not shown the key
GREETING_TIMEOUT_S = 5.0
REPORT = 0  # the number of what answers no call
_SIZE = struct.Struct("<I")


class SignedStream:
    """Messages over a connection. Each end signs with ``own_key`` and expects ``peer_key``."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, own_key: bytes, peer_key: bytes
    ) -> None:
        self._reader, self._writer = reader, writer
        self._own_key, self._peer_key = own_key, peer_key
        self._num_sent = self._num_received = 0

    def send(self, message: object) -> None:
        """Put it into the connection's buffer."""
        payload = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        size = _SIZE.pack(len(payload))
        self._writer.write(b"".join((size, _sign_message(self._own_key, self._num_sent, size, payload), payload)))
        self._num_sent += 1

    async def flush(self) -> None:
        """Wait until the other end has taken most of it. Raises ``OSError``."""
        await self._writer.drain()

    async def receive(self) -> Any:
        """The next message. Raises ``OSError`` or ``EOFError`` at the end, ``ValueError`` for what the peer did not
        sign.
        """
        head = await self._reader.readexactly(_SIZE.size + MAC_BYTES)
        size, signature = head[: _SIZE.size], head[_SIZE.size :]
        (num_bytes,) = _SIZE.unpack(size)
        if num_bytes > MAX_MESSAGE_BYTES:
            raise ValueError(f"a message of {num_bytes} bytes; at most {MAX_MESSAGE_BYTES} are allowed")
        payload = await self._reader.readexactly(num_bytes)
        if not hmac.compare_digest(_sign_message(self._peer_key, self._num_received, size, payload), signature):
            raise ValueError("a message was altered on its way: its signature is wrong")
        self._num_received += 1
        try:
            return pickle.loads(payload)
        except Exception as error:
            raise ValueError(f"a message cannot be read here, where versions may differ: {error!r}") from error

    def close(self) -> None:
        """Hang up. Idempotent."""
        self._writer.close()


class LineServer:
    """The worker's end, on its event loop.

    Args:
        host: address to listen on.
        context: for TLS; None: plain.
        next_report: waits for what is new for a session, raises ``LongctxError`` once there is nothing more to come.
        call: what runs one of ``CALLS``.
    """

    def __init__(
        self,
        host: str,
        context: ssl.SSLContext | None,
        *,
        next_report: Callable[[str], Awaitable[WorkerReport]],
        call: Callable[..., Awaitable[Any]],
    ) -> None:
        self._host, self._context = host, context
        self._next_report, self._call = next_report, call
        self._server: asyncio.Server | None = None
        self._session = ""
        self._key = b""
        self._num_strangers = 0
        self._serving: set[asyncio.Task[None]] = set()
        self._calls: set[asyncio.Task[None]] = set()

    async def open(self, session: str) -> LineAddress:
        """Serve who shows the key that this returns, and nobody else any more. Raises ``OSError``."""
        if self._server is None:
            self._server = await asyncio.start_server(self._greet, self._host, 0, ssl=self._context)
        self._end_serving()
        self._session, self._key = session, secrets.token_bytes(KEY_BYTES)
        return LineAddress(self._host, self._server.sockets[0].getsockname()[1], self._key)

    def close(self) -> None:
        """Close what is open."""
        if self._server is not None:
            self._server.close()
        self._end_serving()

    def _end_serving(self) -> None:
        for task in self._serving:
            task.cancel()

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self._num_strangers >= MAX_STRANGERS:
                return
            self._num_strangers += 1
            try:
                async with asyncio.timeout(GREETING_TIMEOUT_S):
                    stream = await self._identify(reader, writer)
            finally:
                self._num_strangers -= 1
            if stream is None:
                logger.warning(
                    "somebody without its key came to the router's line: %s", writer.get_extra_info("peername")
                )
                return
            self._key = b""
            tasks = {
                asyncio.create_task(self._report(stream, self._session)),
                asyncio.create_task(self._answer(stream)),
            }
            self._serving |= tasks
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                self._serving -= tasks
                for task in tasks:
                    task.cancel()
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _identify(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> SignedStream | None:
        """None for somebody who has not the key."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        writer.write(GREETING + nonce)
        answer = await reader.readexactly(NONCE_BYTES + MAC_BYTES)
        keys = _make_keys(self._key, nonce + answer[:NONCE_BYTES])
        if not self._key or not hmac.compare_digest(keys["proof"], answer[NONCE_BYTES:]):
            return None
        return SignedStream(reader, writer, own_key=keys["worker"], peer_key=keys["router"])

    async def _report(self, stream: SignedStream, session: str) -> None:
        with suppress(OSError):  # the router has gone: it comes back with another session
            while True:
                try:
                    message = (REPORT, await self._next_report(session), None)
                except LongctxError as error:
                    stream.send((REPORT, None, error))
                    await stream.flush()
                    return
                stream.send(message)
                await stream.flush()

    async def _answer(self, stream: SignedStream) -> None:
        """Run calls, each as a task begun in the order of arrival. They end even if the router has gone."""
        try:
            while True:
                task = asyncio.create_task(self._run(stream, *await stream.receive()))
                self._calls.add(task)
                task.add_done_callback(self._calls.discard)
        except (OSError, EOFError):
            return
        except ValueError as error:
            logger.warning("the router's line: %s", error)

    async def _run(self, stream: SignedStream, number: int, method: str, args: tuple[Any, ...]) -> None:
        try:
            if method not in CALLS:
                raise LongctxError(f"{method} is no call for this line; allowed: {', '.join(sorted(CALLS))}")
            message = (number, await self._call(method, *args), None)
        except Exception as error:  # noqa: BLE001 - handed to the caller
            message = (number, None, error)
        try:
            stream.send(message)
        except (pickle.PicklingError, TypeError, AttributeError):
            stream.send((number, None, LongctxError(f"{method} ended with what cannot be sent: {message[1:]}")))


class Line:
    """The router's end; ``connect`` makes it.

    Args:
        stream: connected.
    """

    def __init__(self, stream: SignedStream) -> None:
        self._stream = stream
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._num_calls = 0
        self._reports: asyncio.Queue[WorkerReport | Exception] = asyncio.Queue()
        self._end: Exception | None = None  # why nothing comes any more
        self._reading = asyncio.create_task(self._read())

    async def next_report(self) -> WorkerReport:
        """The next report; raises ``WorkerLostError`` if none will come."""
        report = await self._reports.get()
        if isinstance(report, Exception):
            self._reports.put_nowait(report)
            raise report
        return report

    async def call(self, method: str, /, *args: Any) -> Any:
        """One of ``CALLS``. Raises what it raised, ``WorkerLostError`` if there will be no answer."""
        if self._end is not None:
            raise self._end
        self._num_calls += 1
        number = self._num_calls
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        self._stream.send((number, method, args))
        try:
            return await answer
        finally:
            self._answers.pop(number, None)

    def close(self) -> None:
        """Hang up. Idempotent."""
        self._reading.cancel()
        self._stream.close()

    async def _read(self) -> None:
        end: Exception = WorkerLostError("its process ended, or the connection to it")
        try:
            while True:
                number, result, failure = await self._stream.receive()
                if number != REPORT:
                    self._take_answer(number, result, failure)
                elif failure is not None:
                    end = WorkerLostError(str(failure))
                    return
                else:
                    self._reports.put_nowait(result)
        except (OSError, EOFError):
            return
        except ValueError as problem:
            end = WorkerLostError(f"the connection to it cannot be used: {problem}")
        finally:
            self._end = end
            self._stream.close()
            self._reports.put_nowait(end)
            for answer in self._answers.values():
                if not answer.done():
                    answer.set_exception(end)

    def _take_answer(self, number: int, result: Any, failure: Exception | None) -> None:
        answer = self._answers.get(number)
        if answer is None or answer.done():  # nobody waits any more
            return
        if failure is None:
            answer.set_result(result)
        else:
            answer.set_exception(failure)


async def connect(address: LineAddress, *, context: ssl.SSLContext | None, timeout_s: float) -> Line:
    """Raises ``OSError`` (``TimeoutError`` is one) if nobody answers there who speaks this protocol."""
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_connection(address.host, address.port, ssl=context)
        try:
            greeting = await reader.readexactly(len(GREETING) + NONCE_BYTES)
            if not greeting.startswith(GREETING):
                raise ConnectionError("what answers is no worker of this version")
            nonce = secrets.token_bytes(NONCE_BYTES)
            keys = _make_keys(address.key, greeting[len(GREETING) :] + nonce)
            writer.write(nonce + keys["proof"])
            return Line(SignedStream(reader, writer, own_key=keys["router"], peer_key=keys["worker"]))
        except asyncio.IncompleteReadError:
            writer.close()
            raise ConnectionError("the worker hung up") from None
        except BaseException:
            writer.close()
            raise


def _make_keys(key: bytes, nonces: bytes) -> dict[str, bytes]:
    """The proof that its sender has the line's key, and what either end signs with on this connection."""
    return {use: _sign(key, use.encode() + nonces) for use in ("proof", "router", "worker")}


def _sign(key: bytes, message: bytes) -> bytes:
    return hmac.digest(key, message, "sha256")


def _sign_message(key: bytes, number: int, size: bytes, payload: bytes) -> bytes:
    return _sign(key, number.to_bytes(8, "little") + size + payload)
