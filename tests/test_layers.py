"""The layers: what may import what, and what runs without what."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from longctx.models.checkpoint import SHIPPED

ROOT = Path(__file__).parent.parent
PACKAGES = ("longctx", "parallel", "memory", "cluster")
LINT = Path(sys.executable).with_name("lint-imports")
TIMEOUT_S = 240.0
# One import that each contract of pyproject.toml forbids: the contract, the file, the line.
FORBIDDEN = [
    ("A folder imports only to its right", "parallel/registry.py", "import memory.pages"),
    ("A folder imports only to its right", "memory/pages.py", "import longctx.messages"),
    ("A folder imports only to its right", "longctx/llm.py", "import cluster.config"),
    ("Only cluster knows Ray", "longctx/engine/engine.py", "def late():\n    import ray"),
    ("Hydra stops at the entry point", "longctx/engine/config.py", "import omegaconf"),
    ("memory and parallel know no HTTP", "memory/link.py", "from fastapi import FastAPI"),
    ("Only the module of a Triton kernel imports Triton", "parallel/merge.py", "import triton"),
    ("flash-attn is reached through the registries only", "parallel/flash_attn.py", "import flash_attn"),
]
# What a GPU machine may lack, and what the engine has no business with.
WITHOUT = """
import sys
for name in ("ray", "cluster", "fastapi", "uvicorn", "starlette", *{extra}):
    sys.modules[name] = None
"""
LIBRARY = """
from longctx import LLM, SamplingParams
from longctx.engine.config import EngineConfig

with LLM("demo", engine_config=EngineConfig(kv_bytes="16MiB", num_threads=1)) as llm:
    (output,) = llm.generate("import os\\nimport ", SamplingParams(max_tokens=8, temperature=0))
    assert len(output.outputs[0].token_ids) == 8, output
"""
COMMAND = """
from longctx.cli.main import main

words = ["generate.prompt=import os", "generate.max_tokens=8", "engine.kv_bytes=16MiB", "engine.num_threads=1"]
assert main(["generate", *words]) == 0
"""


def lint(folder):
    done = subprocess.run(
        [LINT, "--no-cache"], cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_the_import_contracts_hold():
    code, output = lint(ROOT)
    assert code == 0, output
    assert " 0 broken" in output


@pytest.mark.parametrize(("contract", "file", "line"), FORBIDDEN)
def test_each_contract_finds_what_it_forbids(tmp_path, contract, file, line):
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns(*SHIPPED, "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / file).open("a") as source:
        source.write(f"\n{line}\n")
    code, output = lint(tmp_path)
    assert code == 1, output
    (broken,) = [text for text in output.splitlines() if " BROKEN" in text]
    assert broken.startswith(contract)


@pytest.mark.parametrize(
    ("script", "extra"), [(LIBRARY, ("hydra", "omegaconf")), pytest.param(COMMAND, (), marks=pytest.mark.slow)]
)
def test_the_engine_runs_without_ray(script, extra):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(extra=extra) + script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
