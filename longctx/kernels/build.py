"""Compiles the C files beside it for this machine once and loads them.

The shared object is kept in the user's cache folder under a digest of sources, compiler and CPU, so a second process
and a second start find it; a new CPU or a new source makes a new one. Needs a C compiler with OpenMP (gcc, clang).
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
SOURCES = tuple(sorted(FOLDER.glob("*.c")))
HEADERS = tuple(sorted(FOLDER.glob("*.h")))
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-ffp-contract=fast", "-shared", "-fPIC", "-Wno-psabi")
BUILD_TIMEOUT_S = 120


class NativeBuildError(RuntimeError):
    """The native kernels cannot be compiled or loaded here; the text says why."""


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``$XDG_CACHE_HOME/longctx``, ``~/.cache/longctx`` or a temporary one."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "longctx"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError as error:
        logger.info("cache folder %s is not usable (%s)", folder, error)
    return Path(tempfile.mkdtemp(prefix="longctx-"))


@cache
def load_native() -> ctypes.CDLL:
    """The compiled library. Import torch first, so that both use one OpenMP thread pool.

    Raises ``NativeBuildError`` if there is no compiler or it fails.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise NativeBuildError("no C compiler found (cc, gcc or clang)")
    target = cache_folder() / f"native-{_digest(compiler)}.so"
    if not target.exists():
        _compile(compiler, target)
    try:
        library = ctypes.CDLL(str(target))
    except OSError as error:
        raise NativeBuildError(f"{target} cannot be loaded: {error}") from error
    _declare(library)
    return library


def _declare(library: ctypes.CDLL) -> None:
    pointer, int64, int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    library.longctx_prepare.argtypes = library.longctx_attend.argtypes = [pointer]
    library.longctx_prepare.restype = None
    library.longctx_rms_norm.argtypes = [pointer, pointer, pointer, pointer, int64, int64, ctypes.c_float, int32, int32]
    library.longctx_silu_mul.argtypes = [pointer, pointer, int64, int64, int32, int32]
    library.longctx_rms_norm.restype = library.longctx_silu_mul.restype = None
    library.longctx_rank.argtypes = [pointer, pointer, int64, int64, int32, ctypes.c_float, int32]
    library.longctx_rank.restype = None
    library.longctx_linear.argtypes = [pointer, pointer, pointer, pointer, int64, int64, int64, int32]


def _digest(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=BUILD_TIMEOUT_S, check=False).stdout
    parts = (*(path.read_bytes() for path in (*SOURCES, *HEADERS)), version, _cpu().encode(), " ".join(FLAGS).encode())
    return hashlib.blake2b(b"\0".join(parts), digest_size=10).hexdigest()


def _cpu() -> str:
    """The CPU's model and features; ``-march=native`` depends on both."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _compile(compiler: str, target: Path) -> None:
    handle, name = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        command = [compiler, *FLAGS, *map(str, SOURCES), "-o", name, "-lm"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False)
        if result.returncode:
            raise NativeBuildError(f"{compiler} failed: {result.stderr.strip()[-500:]}")
        os.replace(name, target)  # atomic: another process may build the same file
    finally:
        Path(name).unlink(missing_ok=True)
