"""Whether a decode worker should load a prompt's stored pages itself instead of being sent them; prints JSON.

    python -m benchmarks.stored_prefixes [--rounds 5] [--folder DIR] [--save NAME]

Each round times, in turn, for the same 256 MiB (256 pages of 16 layers): a copy with numpy; shipping over ``tcp`` and
``shared_memory``, from opening the stream to the acknowledgement (``benchmarks/transport.py``); loading from a folder
on the disk whose files the kernel has in memory, from the same files after it let go of them, and from ``/dev/shm``.
Reported are medians, and the shares of the copy's rate.
"""

import argparse
import json
import multiprocessing
import os
import queue
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe_run, keep_result
from benchmarks.transport import LAYOUTS, TIMEOUT_S, copy_seconds, make_config, serve_sender
from memory.page_files import PageFiles
from memory.pages import PagePool
from memory.prefix_store import PrefixStore
from memory.transport import TRANSPORTS

LAYOUT, NUM_PAGES = LAYOUTS["bulk"]
SHIPPED = ("tcp", "shared_memory")
PAGES = list(range(NUM_PAGES))
DIGESTS = [number.to_bytes(16, "big") for number in PAGES]


def main() -> None:
    """Run the rounds and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds to take medians of, at least 5")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk")
    parser.add_argument("--save", help="also write benchmarks/results/NAME.json")
    arguments = parser.parse_args()
    if arguments.rounds < 5:
        parser.error(f"--rounds={arguments.rounds} is not allowed: at least 5")
    result = describe_run("stored_prefixes") | measure(arguments.rounds, arguments.folder)
    print(json.dumps(result, indent=2))
    keep_result(result, arguments.save)


def measure(num_rounds: int, folder: Path) -> dict[str, Any]:
    """All medians."""
    target = PagePool(LAYOUT, NUM_PAGES)
    target.storage.random_(0, 256)
    places = {name: Path(tempfile.mkdtemp(dir=place)) for name, place in (("disk", folder), ("shm", Path("/dev/shm")))}
    here, there = multiprocessing.get_context("spawn").Pipe()
    sender = multiprocessing.get_context("spawn").Process(target=serve_sender, args=(there,), daemon=True)
    sender.start()
    finished: queue.Queue[str] = queue.Queue()
    receivers = {
        name: TRANSPORTS.get(name).make_receiver(
            target,
            make_config(name),
            on_commit=lambda request_id, payload: finished.put(""),
            on_failed=lambda request_id, reason: finished.put(reason),
        )
        for name in SHIPPED
    }
    try:
        stores = {name: make_store(place, target) for name, place in places.items()}
        here.recv()
        seconds: dict[str, list[float]] = {}
        source, copy = (np.ones(LAYOUT.page_bytes * NUM_PAGES, dtype=np.uint8) for _ in range(2))
        for round_idx in range(num_rounds + 1):  # the first one warms up
            samples = {"memcpy": copy_seconds(copy, source)}
            for name, receiver in receivers.items():
                grant = receiver.grant(f"round-{round_idx}", PAGES, page_idxs=PAGES, num_tokens=NUM_PAGES * 16)
                here.send((("bulk", name), grant))
                samples[name] = here.recv() if here.poll(TIMEOUT_S) else float("inf")
                if reason := finished.get(timeout=TIMEOUT_S):
                    raise RuntimeError(reason)
            samples["disk_in_memory"] = load_seconds(stores["disk"])
            forget(places["disk"])
            samples["disk"] = load_seconds(stores["disk"])
            samples["shm"] = load_seconds(stores["shm"])
            for name, sample in samples.items():
                seconds.setdefault(name, []).extend([sample] if round_idx else [])
        here.send(None)
        sender.join(TIMEOUT_S)
    finally:
        for receiver in receivers.values():
            receiver.close()
        for place in places.values():
            shutil.rmtree(place)
    return {"rounds": num_rounds, "bytes": LAYOUT.page_bytes * NUM_PAGES, **summarise(seconds)}


def make_store(place: Path, pool: PagePool) -> PrefixStore:
    """With all pages of the pool in files."""
    writer = PrefixStore(PageFiles(place, max_bytes=1 << 40), pool)
    for digest, page in zip(DIGESTS, PAGES, strict=True):
        while writer.num_saved < page - 16:  # not more than may wait
            time.sleep(0.01)
        writer.save([digest], [page])
    writer.close()
    os.sync()
    store = PrefixStore(PageFiles(place, max_bytes=1 << 40), pool)
    if store.count(DIGESTS) != NUM_PAGES:
        raise RuntimeError(f"{place} could not be written")
    return store


def load_seconds(store: PrefixStore) -> float:
    """Of all pages."""
    start = time.perf_counter()
    if store.load(DIGESTS, PAGES) != NUM_PAGES:
        raise RuntimeError("a page is not there")
    return time.perf_counter() - start


def forget(place: Path) -> None:
    """Let the kernel drop what it has of the files."""
    for path in place.rglob("*.kv"):
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def summarise(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Rates by what was timed."""
    size = LAYOUT.page_bytes * NUM_PAGES
    medians = {name: statistics.median(samples) for name, samples in seconds.items()}
    return {
        name: {
            "gib_per_s": round(size / median / 2**30, 3),
            "share_of_memcpy": round(medians["memcpy"] / median, 3),
            "ms_per_page": round(median / NUM_PAGES * 1e3, 3),
            "lowest_and_highest_s": [round(min(seconds[name]), 3), round(max(seconds[name]), 3)],
        }
        for name, median in medians.items()
    }


if __name__ == "__main__":
    main()
