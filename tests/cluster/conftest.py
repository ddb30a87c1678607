"""One real ``longctx serve`` for the test modules that ask it: starting one takes longer than most tests."""

from collections.abc import Iterator

import pytest

from tests.cli_server import CliServer, launch

KEY = "correct-horse"


@pytest.fixture(scope="session")
def served(tmp_path_factory) -> Iterator[CliServer]:
    """The demo model in fp32, with an API key and a small body limit."""
    overrides = [f"server.api_keys=[{KEY}]", "server.max_body_bytes=1MiB", "model.dtype=float32"]
    with launch(tmp_path_factory.mktemp("served"), *overrides, key=KEY) as server:
        server.wait_until_ready()
        yield server
