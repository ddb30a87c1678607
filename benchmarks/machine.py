"""What a result was measured on and with, and where it is kept."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
PACKAGES = ("torch", "transformers", "ray", "flash-attn", "triton")


def describe_run(benchmark: str) -> dict[str, Any]:
    """How every result begins: ``benchmark`` is a module here."""
    return {
        "benchmark": benchmark,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join([f"python -m benchmarks.{benchmark}", *sys.argv[1:]]),
        **describe_commit(),
        "hardware": describe_machine(),
        "versions": describe_versions(),
    }


def keep_result(content: dict[str, Any], name: str | None) -> None:
    """Write ``benchmarks/results/NAME.json``, if there is a name."""
    if name:
        (REPOSITORY / "benchmarks" / "results" / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def describe_machine() -> dict[str, Any]:
    """CPU, cores, memory and GPU."""
    cpu_info = _read("/proc/cpuinfo")
    memory = {line.split(":")[0]: line.split()[1] for line in _read("/proc/meminfo").splitlines() if ":" in line}
    flags = next((line.split() for line in cpu_info.splitlines() if line.startswith("flags")), [])
    names = (line.partition(":")[2].strip() for line in cpu_info.splitlines() if line.startswith("model name"))
    return {
        "cpu": next(names, platform.processor()),
        "cpu_features": [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags],
        "num_cores": count_cores(),
        "memory_gib": round(int(memory.get("MemTotal", 0)) / 2**20, 1),
        "gpu": _describe_gpu(),
        "kernel": platform.release(),
        "load_1m": os.getloadavg()[0],
    }


def describe_versions() -> dict[str, str | None]:
    """Versions of Python and the packages that matter; None: not installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def describe_commit() -> dict[str, Any]:
    """The commit, and whether tracked files differ from it."""
    return {"commit": _git("rev-parse", "HEAD"), "modified": bool(_git("status", "--porcelain", "-uno"))}


def count_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _describe_gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Output of a git command; None where there is no repository or no git."""
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _read(path: str) -> str:
    file = Path(path)
    return file.read_text() if file.exists() else ""
