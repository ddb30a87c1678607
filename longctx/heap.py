"""How a process that trains on a CPU gives memory back."""

import os

# glibc keeps what tensors of up to 32 MiB leave on its heap, whose holes then stay with the process: up to a third of
# its peak. With a fixed threshold every larger tensor is mapped, and gone when it is freed; the system clears every
# page that it maps, which takes a tenth of a step and more, with huge pages; without them twice that.
_TUNABLES = "glibc.malloc.mmap_threshold=1048576:glibc.malloc.hugetlb=1"


def heap_env(compact: bool) -> dict[str, str]:
    """To start the process with; what the user has set there stays. Other C libraries do not read it."""
    return {"GLIBC_TUNABLES": _TUNABLES} if compact and "GLIBC_TUNABLES" not in os.environ else {}
