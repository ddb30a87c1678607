"""The wheel: what is in it, and what works from it outside the repository, in an environment without torch and Ray."""

import os
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import longctx
from longctx.cli.commands import COMMANDS
from longctx.config import list_keys
from parallel.registry import load

ROOT = Path(__file__).parent.parent
PACKAGES = ("longctx", "parallel", "memory", "cluster", "configs")
TIMEOUT_S = 600.0  # the package index may be slow
COMPOSE = """
import sys
from longctx.cli.commands import COMMANDS
from longctx.config import compose
from parallel.registry import load
name, *overrides = sys.argv[1:]
print(compose(load(COMMANDS[name].root), COMMANDS[name].config_name, overrides))
"""
WHERE = """
import importlib.metadata, importlib.util, longctx, parallel, memory, cluster
assert not [name for name in ("torch", "ray", "transformers") if importlib.util.find_spec(name)]
print(importlib.metadata.version("longctx"), *(package.__file__ for package in (longctx, parallel, memory, cluster)))
"""


def run(words, folder):
    """Run a command in ``folder`` with nothing of this process's Python in its environment."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return subprocess.run(
        [str(word) for word in words],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    done = run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The ``bin`` folder of an environment with the wheel and Hydra."""
    folder = tmp_path_factory.mktemp("environment")
    for words in (
        [sys.executable, "-m", "venv", folder],
        [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", wheel],
        [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "hydra-core>=1.3"],
    ):
        done = run(words, folder)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "bin"


def test_every_file_of_the_packages_is_in_the_wheel(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()]
    expected = {path.relative_to(ROOT).as_posix() for path in files if path.suffix not in (".pyc", ".so")}
    assert names == expected
    assert {f"{package}/py.typed" for package in PACKAGES if package != "configs"} <= names
    assert {"configs/serve.yaml", "configs/model/demo.yaml", "longctx/kernels/attention.c"} <= names
    demo = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    assert {f"longctx/models/demo/{name}" for name in demo} <= names


def test_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    info = f"longctx-{longctx.__version__}.dist-info"
    metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
    assert metadata["Name"] == "longctx"
    assert metadata["Version"] == longctx.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert "longctx = longctx.cli.main:main" in archive.read(f"{info}/entry_points.txt").decode()


def test_the_environment_has_the_wheel_and_nothing_heavy(installed, tmp_path):
    done = run([installed / "python", "-c", WHERE], tmp_path)
    assert done.returncode == 0, done.stderr
    version, *files = done.stdout.split()
    assert version == longctx.__version__
    assert all(Path(file).is_relative_to(installed.parent) for file in files)


def test_help_lists_the_commands(installed, tmp_path):
    done = run([installed / "longctx", "--help"], tmp_path)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS.values():
        assert command.comment in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_lists_its_keys(installed, tmp_path, name):
    done = run([installed / "longctx", *name.split(), "--help"], tmp_path)
    assert done.returncode == 0, done.stderr
    for key, field in list_keys(load(COMMANDS[name].root)).items():
        assert f"  {key}=" in done.stdout
        assert field.metadata["comment"] in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_hydra_composes_from_the_wheel(installed, tmp_path, name):
    keys = list_keys(load(COMMANDS[name].root))
    bounded = [key for key, field in keys.items() if field.type is int and field.metadata["minimum"]]
    values = {key: keys[key].metadata["minimum"] + 1 for key in bounded[:1]}
    done = run(
        [installed / "python", "-c", COMPOSE, name, *(f"{key}={value}" for key, value in values.items())], tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert load(COMMANDS[name].root).__name__ in done.stdout
    for key, value in values.items():
        assert f"{keys[key].name}={value}" in done.stdout


def test_groups_compose_from_the_wheel(installed, tmp_path):
    overrides = ["cluster=colocated", "transport=tcp", "server=public", "engine=single", "ray=cluster"]
    done = run([installed / "python", "-c", COMPOSE, "serve", *overrides], tmp_path)
    assert done.returncode == 0, done.stderr
    for text in ("num_prefill_workers=0", "name='tcp'", "host='0.0.0.0'", "max_batch_tokens=4096", "address='auto'"):
        assert text in done.stdout


def test_a_mistake_is_named_without_torch_and_ray(installed, tmp_path):
    done = run([installed / "longctx", "serve", "engine.kv_byte=1GiB"], tmp_path)
    assert done.returncode == 2
    assert "did you mean engine.kv_bytes" in done.stderr
    assert "Traceback" not in done.stderr
