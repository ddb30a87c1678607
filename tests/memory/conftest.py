"""What tests of transports share."""

import threading
from collections.abc import Iterator

import pytest


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No thread ends with a traceback."""
    ended: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: ended.append(repr(args.exc_value)))
    yield
    assert ended + [record.getMessage() for record in caplog.get_records("call") if record.exc_info] == []
