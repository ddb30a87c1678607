"""The connection between a router and a worker: what arrives, who may speak, and what ends it."""

import asyncio
import random
from contextlib import asynccontextmanager

import pytest

from cluster.messages import LineAddress, WorkerReport
from cluster.serving import WorkerStats
from cluster.worker_line import GREETING, LineServer, connect
from longctx.errors import LongctxError, RequestError, WorkerLostError
from longctx.messages import EngineStats, OutputDelta, TokenLogprob
from memory.config import TransportConfig
from memory.tls import make_context
from tests.certificates import make_certificate


def make_report(number=0):
    delta = OutputDelta(
        f"r{number}", 1, (3, 4), "a\ud800\u2028\"é", (TokenLogprob(3, -0.1, ((3, -0.1), (9, float("-inf")))),) * 2,
        "stop", 17, 5, 2, None,
    )  # fmt: skip
    stats = WorkerStats("decode-0", "decode", EngineStats(num_running=2, details={"a": 1.5}), "host", 7, draining=True)
    return WorkerReport("abc", (delta, OutputDelta("s", 0, (), "")), (("p", ""), ("q", "why")), stats, True)


class Source:
    """What a worker has to report, and what it answers."""

    def __init__(self):
        self.queue = asyncio.Queue()

    async def next_report(self, session):
        report = await self.queue.get()
        if isinstance(report, Exception):
            raise report
        return report

    async def call(self, method, *args):
        if method == "admit":
            raise RequestError("too long", param="prompt")
        if method == "cancel":
            raise ValueError(lambda: "no pickle takes this")
        await asyncio.sleep(args[0])
        return method, args


@asynccontextmanager
async def a_server(context=None):
    source = Source()
    server = LineServer("127.0.0.1", context, next_report=source.next_report, call=source.call)
    try:
        yield source, server
    finally:
        server.close()


@asynccontextmanager
async def a_line():
    async with a_server() as (source, server):
        line = await connect(await server.open("s"), context=None, timeout_s=5)
        try:
            yield source, server, line
        finally:
            line.close()


@asynccontextmanager
async def a_proxy(address, change):
    """In front of a worker; what comes from there is what ``change`` makes of it."""

    async def carry(reader, writer, change):
        while data := await reader.read(1 << 16):
            writer.write(change(data))
        writer.close()

    async def serve(reader, writer):
        far_reader, far_writer = await asyncio.open_connection(address.host, address.port)
        await asyncio.gather(carry(reader, far_writer, bytes), carry(far_reader, writer, change))

    proxy = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield LineAddress("127.0.0.1", proxy.sockets[0].getsockname()[1], address.key)
    finally:
        proxy.close()


def test_reports_come_in_order_and_the_reason_at_the_end():
    async def scenario():
        async with a_line() as (source, _, line):
            for number in range(50):
                source.queue.put_nowait(make_report(number))
            source.queue.put_nowait(LongctxError("a rank is lost"))
            assert [await line.next_report() for _ in range(50)] == [make_report(number) for number in range(50)]
            with pytest.raises(WorkerLostError, match="a rank is lost"):
                await line.next_report()

    asyncio.run(scenario())


def test_calls_are_answered_when_they_end_and_beside_reports():
    async def scenario():
        async with a_line() as (source, _, line):
            calls = [asyncio.create_task(line.call("prefill", seconds)) for seconds in (0.2, 0.1, 0.0)]
            source.queue.put_nowait(make_report())
            done, _ = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            assert done == {calls[2]}
            assert await asyncio.gather(*calls) == [("prefill", (0.2,)), ("prefill", (0.1,)), ("prefill", (0.0,))]
            assert await line.next_report() == make_report()
            with pytest.raises(RequestError, match="too long") as caught:
                await line.call("admit")
            assert caught.value.param == "prompt"
            with pytest.raises(LongctxError, match="cannot be sent"):
                await line.call("cancel")
            with pytest.raises(LongctxError, match="close is no call for this line; allowed: admit, cancel"):
                await line.call("close")
            waits = asyncio.create_task(line.call("prefill", 60))
            await asyncio.sleep(0.05)
            source.queue.put_nowait(LongctxError("a rank is lost"))
            with pytest.raises(WorkerLostError, match="a rank is lost"):
                await waits
            with pytest.raises(WorkerLostError, match="a rank is lost"):
                await line.call("prefill", 0)

    asyncio.run(scenario())


def test_the_next_session_ends_the_one_before():
    async def scenario():
        async with a_line() as (source, server, line):
            next_line = await connect(await server.open("t"), context=None, timeout_s=5)
            with pytest.raises(WorkerLostError, match="ended"):
                await line.next_report()
            source.queue.put_nowait(make_report())
            assert await next_line.next_report() == make_report()
            next_line.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("key", ["another", "used"])
def test_who_has_not_the_key_reads_nothing(key, caplog):
    async def scenario():
        async with a_server() as (_, server):
            address = await server.open("s")
            if key == "used":
                await connect(address, context=None, timeout_s=5)
                await asyncio.sleep(0.05)
            else:
                address = LineAddress(address.host, address.port, bytes(32))
            line = await connect(address, context=None, timeout_s=5)
            with pytest.raises(WorkerLostError):
                await line.next_report()
            line.close()

    asyncio.run(scenario())
    assert "without its key" in caplog.text


def test_a_line_under_tls_takes_no_stranger(tmp_path):
    made = {name: make_certificate(tmp_path / name, name) for name in ("ours", "theirs")}

    def context(name, *, server_side):
        own, authority = made[name], made["ours"].certificate
        config = TransportConfig(tls_certificate=own.certificate, tls_key=own.key, tls_ca=authority)
        return make_context(config, server_side=server_side)

    async def try_to_read(server, context):
        line = await connect(await server.open("s"), context=context, timeout_s=2)
        await line.next_report()

    async def scenario():
        mine, strange = (context(name, server_side=False) for name in ("ours", "theirs"))
        async with a_server(context("ours", server_side=True)) as (source, server):
            for wrong in (strange, None):
                with pytest.raises((OSError, WorkerLostError)):
                    await try_to_read(server, wrong)
            line = await connect(await server.open("s"), context=mine, timeout_s=5)
            source.queue.put_nowait(make_report())
            assert await line.next_report() == make_report()
            line.close()

    asyncio.run(scenario())


def test_what_was_altered_on_the_way_is_not_taken():
    drawn = random.Random(0)

    def alter(data):
        if data.startswith(GREETING):
            return data
        place = drawn.randrange(len(data))
        return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]

    async def scenario():
        async with a_server() as (source, server), a_proxy(await server.open("s"), alter) as address:
            line = await connect(address, context=None, timeout_s=5)
            source.queue.put_nowait(make_report())
            with pytest.raises((WorkerLostError, TimeoutError)):
                async with asyncio.timeout(0.5):  # an altered length waits for bytes that never come
                    await line.next_report()
            line.close()

    for _ in range(20):
        asyncio.run(scenario())


def test_a_report_is_not_taken_twice():
    async def scenario():
        async with (
            a_server() as (source, server),
            a_proxy(await server.open("s"), lambda data: data if data.startswith(GREETING) else data * 2) as address,
        ):
            line = await connect(address, context=None, timeout_s=5)
            source.queue.put_nowait(make_report())
            assert await line.next_report() == make_report()
            with pytest.raises(WorkerLostError, match="signature"):
                await line.next_report()
            line.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "greeting", [b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(100), b"", GREETING[:-1] + b"9" + bytes(16)]
)
def test_another_service_is_no_worker(greeting):
    async def scenario():
        async def answer(reader, writer):
            writer.write(greeting)
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(OSError):  # noqa: PT011 - of any kind
            await connect(LineAddress("127.0.0.1", port, bytes(32)), context=None, timeout_s=5)
        server.close()

    asyncio.run(scenario())


def test_who_says_nothing_is_hung_up_on(monkeypatch):
    monkeypatch.setattr("cluster.worker_line.GREETING_TIMEOUT_S", 0.1)

    async def scenario():
        async with a_server() as (source, server):
            address = await server.open("s")
            reader, writer = await asyncio.open_connection(address.host, address.port)
            async with asyncio.timeout(5):
                assert (await reader.read()).startswith(GREETING)
            writer.close()
            line = await connect(address, context=None, timeout_s=5)
            source.queue.put_nowait(make_report())
            assert await line.next_report() == make_report()
            line.close()

    asyncio.run(scenario())
