"""What a rank can do in a second at most, and what memory it has and has held."""

import contextlib
import functools
import logging
import sys
import time
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

_SIDES = {"cpu": 1024, "cuda": 8192}  # of square matrices: large enough that more would be no faster
_MIN_SECONDS = 0.3  # of repeating: what another program takes is to miss some of the repeats
_STATUS = Path("/proc/self/status")
_MAPPINGS = Path("/proc/self/smaps")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_COPIED_BYTES, _COPIES = 2**28, 5


def measure_peak_flops(device: torch.device, dtype: torch.dtype, *, group: dist.ProcessGroup | None = None) -> float:
    """FLOP/s of matrix products on a rank, the mean over the ranks, which measure at one time. Collective.

    Ranks that share a machine share its cores, and its clock falls when all compute: one alone would be faster.
    """
    side = _SIDES.get(device.type, 1024)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    is_shared = dist.is_initialized()
    if is_shared:
        dist.barrier(group)
    best = _time_product(a, b)  # not one of those that count: the first makes threads and kernels ready
    begun, best = time.perf_counter(), float("inf")
    while time.perf_counter() - begun < _MIN_SECONDS:
        best = min(best, _time_product(a, b))
    flops = torch.tensor([2 * side**3 / best], dtype=torch.float64 if device.type == "cpu" else torch.float32)
    if not is_shared:
        return float(flops)
    flops = flops.to(device)
    dist.all_reduce(flops, group=group)
    return float(flops) / dist.get_world_size(group)


def choose_dtype(name: str, device_type: str) -> str:
    """What ``model.dtype`` means on a device: auto is bfloat16, or float32 on a CPU that has no instructions for it."""
    if name != "auto":
        return name
    return "float32" if _is_slow(device_type) else "bfloat16"


def choose_product_dtype(dtype: str, device_type: str) -> str:
    """What an engine's linear layers multiply in (``longctx/models/linear.py``)."""
    return "float32" if dtype == "bfloat16" and _is_slow(device_type) else dtype


def warn_of_slow_products(dtype: str, device_type: str) -> None:
    """Say so if torch multiplies ``dtype`` slowly on a device: bfloat16, on a CPU that has float32 only."""
    if dtype == "bfloat16" and _is_slow(device_type):
        logger.warning(
            "this CPU has no bfloat16 instructions, and without them torch multiplies slowly: model.dtype=float32 is "
            "several times faster here"
        )


def _is_slow(device_type: str) -> bool:
    """Whether bfloat16 is."""
    return device_type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def read_peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU the most that was allocated on it, else the most of this process that was in memory.

    Libraries do not count: processes share their pages, and how many are in memory depends on how the files came into
    the system's cache (60 MiB more when they were just installed). Other files do: a model's weights may be one.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        # Not getrusage: there a process begins with what the one that started it had held.
        lines = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="utf-8").splitlines() if ":" in line)
        if "VmHWM" in lines:
            return int(lines["VmHWM"].split()[0]) * 1024 - _count_library_bytes()
    import resource  # not there on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def read_machine_memory(device: torch.device, *, num_ranks: int) -> int:
    """Bytes for each rank: a GPU's own, else this machine's, or its container's, divided by the ranks on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = psutil.virtual_memory().total
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or "max"
        total = min(total, int(_CGROUP_LIMIT.read_text(encoding="utf-8")))
    return total // num_ranks


def measure_read_speed(device: torch.device) -> float:
    """Bytes a second that are read and written by copying what does not fit into caches."""
    source = torch.ones(_COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(_COPIES):
        begun = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begun)
    return 2 * source.nbytes / best


@functools.cache  # the kernel walks all of a process's pages for it: at the first reading all libraries are there
def _count_library_bytes() -> int:
    """Of shared libraries' files in memory, pages apart that this process has written to."""
    num_kib, is_library = 0, False
    for line in _MAPPINGS.read_text(encoding="utf-8").splitlines():
        name, *values = line.split()
        if not name.endswith(":"):  # a mapping's first line: addresses, rights, offset, device, inode, path
            is_library = len(values) > 4 and ".so" in Path(values[4]).name
        elif is_library and name == "Rss:":
            num_kib += int(values[0])
        elif is_library and name == "Anonymous:":
            num_kib -= int(values[0])
    return num_kib * 1024


def _time_product(a: torch.Tensor, b: torch.Tensor) -> float:
    begun = time.perf_counter()
    torch.mm(a.T, b)  # on a CPU without bfloat16 instructions torch takes twenty times as long for (a, b)
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    return time.perf_counter() - begun
