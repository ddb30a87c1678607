"""How tests are shared out to workers: whole files, and nothing that a file prepares is prepared twice."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

TESTS = """
import os, pathlib, pytest

@pytest.mark.parametrize("number", range(6))
def test_where(number):
    with (pathlib.Path(__file__).parent.parent.parent / "seen").open("a") as file:
        file.write(f"{pathlib.Path(__file__).name} {os.environ['PYTEST_XDIST_WORKER']}\\n")
"""


def test_a_file_runs_on_one_worker_and_those_of_one_server_too(tmp_path):
    folder = tmp_path / "tests" / "cluster"
    folder.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("conftest.py"), folder.parent)
    names = ("test_launch.py", "test_served.py", "test_status.py", "test_other.py", "test_another.py")
    for name in names:
        (folder / name).write_text(TESTS)
    words = [sys.executable, "-m", "pytest", "--numprocesses", "2", "--dist", "loadfile", "-p", "xdist"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # others take seconds to load, in each of three processes
    done = subprocess.run(
        [*words, "tests"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    seen = [line.split() for line in (tmp_path / "seen").read_text().splitlines()]
    assert len(seen) == 6 * len(names)
    workers = {name: {worker for file, worker in seen if file == name} for name in names}
    assert all(len(each) == 1 for each in workers.values()), workers
    assert len(workers["test_launch.py"] | workers["test_served.py"] | workers["test_status.py"]) == 1
    assert set.union(*workers.values()) == {"gw0", "gw1"}
