"""Two tests at a time, if xdist runs them: files are what is shared out, and those that ask one server stay together.

Marks of xdist's ``loadgroup`` would say the same, but pytest 9.2 and xdist 3.8 together ignore them, without a word
(pytest-dev/pytest-xdist#1386): a server, and whatever else a file prepares for its tests, would be started twice.
"""

from typing import Any

import pytest

SERVED = tuple(f"tests/cluster/{name}.py" for name in ("test_launch", "test_served", "test_status"))


def group_of(nodeid: str) -> str:
    """Tests of one group run on one worker, one after another."""
    file = nodeid.partition("::")[0]
    return "served" if file in SERVED else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Groups begin in the order in which they are collected."""
    if config.getvalue("dist") not in ("loadfile", "loadgroup"):
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False
    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first: the server's, the files of no folder, and then the folders by their names."""
    for item in items:
        if "served" in getattr(item, "fixturenames", ()) and group_of(item.nodeid) != "served":
            raise pytest.UsageError(f"{item.nodeid} asks the server: its file belongs into SERVED of tests/conftest.py")
    items.sort(key=lambda item: (group_of(item.nodeid) != "served", item.nodeid.count("/") > 1))
