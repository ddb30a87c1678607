"""One real ``longctx serve`` for the test modules that ask it: starting one takes longer than most tests."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.cli_server import CliServer, launch
from tests.conftest import group_of

KEY = "correct-horse"
_server = ExitStack()


@pytest.fixture(scope="session")
def served(tmp_path_factory) -> Iterator[CliServer]:
    """The demo model in fp32, with an API key and a small body limit."""
    overrides = [f"server.api_keys=[{KEY}]", "server.max_body_bytes=1MiB", "model.dtype=float32"]
    with _server:
        server = _server.enter_context(launch(tmp_path_factory.mktemp("served"), *overrides, key=KEY))
        server.wait_until_ready()
        yield server


def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    """The server ends with the last test that may ask it: an idle one takes a tenth of a core from the others."""
    if nextitem is None or group_of(nextitem.nodeid) != "served":
        _server.close()
