"""Two tests at a time: files are what is shared out, and all that start a Ray of their own go to one worker."""

from pathlib import Path

import pytest

_ROOT = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        part = item.path.relative_to(_ROOT).parts
        item.add_marker(pytest.mark.xdist_group(part[0] if part[0] == "cluster" else "/".join(part)))
