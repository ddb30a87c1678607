"""Whatever a receiver says: each of its streams ends once and in time, and those to other receivers are shipped."""

import itertools
import socket
from contextlib import suppress
from dataclasses import dataclass, replace

import pytest
from hypothesis import strategies as st

from memory.frames import NONCE_BYTES, Header, Kind, control, session_key
from memory.messages import LeaseGrant
from tests.fuzzing import MANY, QUICK, fuzz, hang_up
from tests.memory.kv_pair import CONFIG, WAIT_S, make_pair, ship
from tests.memory.wrong_headers import FIELDS

pytestmark = pytest.mark.usefixtures("quiet")
LASTING = replace(CONFIG, lease_ttl_s=60.0)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a receiver says: a frame that is signed rightly or not, or bytes."""

    kind: int
    fields: dict[str, int]
    payload: bytes
    is_signed: bool
    noise: bytes


ANSWERS = st.lists(
    st.builds(
        Answer,
        st.sampled_from([Kind.PONG, Kind.PONG, Kind.NACK, Kind.ACK, Kind.DATA, Kind.WELCOME, 0, 255]),
        st.just({}) | FIELDS,
        st.binary(max_size=40),
        st.booleans(),
        st.just(b"") | st.just(b"") | st.binary(max_size=100),
    ),
    max_size=6,
)
WELCOMES = st.one_of(
    st.just(b"".join(bytes(part) for part in control(Kind.WELCOME, 0, 0, bytes(NONCE_BYTES), key=b""))),
    st.builds(
        lambda fields, payload: replace(Header(Kind.WELCOME, payload_bytes=len(payload)), **fields).pack(b"") + payload,
        st.just({}) | FIELDS,
        st.binary(max_size=40),
    ),
    st.binary(max_size=100),
)


def check_receivers(*, num_examples: int) -> None:
    """Every stream ends once, soon, and one to another receiver is shipped meanwhile."""
    numbers = itertools.count()
    with make_pair("tcp", LASTING) as pair:

        def check(drawn: tuple[bytes, list[Answer]]) -> None:
            request_id = f"r{next(numbers)}"
            right = pair.grant([0, 1], request_id=request_id)
            with socket.create_server(("127.0.0.1", 0)) as listener:
                hostile = replace(right, address=f"127.0.0.1:{listener.getsockname()[1]}", request_id="hostile")
                ship(pair.open(hostile), [8, 9])
                ship(pair.open(right), [8, 9])
                answer(listener, hostile, *drawn)
                ends = sorted([pair.answer(), pair.answer()])
            assert ("acked", request_id) in ends
            assert [end[1] for end in ends if end != ("acked", request_id)] == ["hostile"]
            assert pair.event()[:2] == ("commit", request_id)
            assert pair.answers.empty()

        fuzz(st.tuples(WELCOMES, ANSWERS), check, num_examples=num_examples)


def answer(listener: socket.socket, grant: LeaseGrant, welcome: bytes, answers: list[Answer]) -> None:
    """Accept a sender, say all this, and hang up."""
    listener.settimeout(WAIT_S)
    connection, _ = listener.accept()
    with connection, suppress(ConnectionError):
        connection.settimeout(WAIT_S)
        connection.sendall(welcome)
        for each in answers:
            header = Header(each.kind, grant.lease_id, grant.epoch, payload_bytes=len(each.payload))
            key = session_key(grant.key, bytes(NONCE_BYTES)) if each.is_signed else b""
            connection.sendall(replace(header, **each.fields).pack(key) + each.payload + each.noise)
        hang_up(connection)
        while connection.recv(1 << 16):
            pass


def test_receivers() -> None:
    check_receivers(num_examples=QUICK)


@pytest.mark.slow
def test_many_receivers() -> None:
    check_receivers(num_examples=MANY)
