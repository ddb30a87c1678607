"""How fast KV travels between two processes of one host, against a memory copy; prints JSON.

    python benchmarks/transport.py [--rounds 5] [--save]

Each round times, in turn: a copy of the whole pool with numpy, then every transport shipping a lease of 256 MiB (16
layers of 256 pages of 64 KiB) and one of 1 MiB (16 pages of one layer). A time runs at the sender from opening the
stream to the acknowledgement, by which every byte is in place and verified. Reported are medians.
"""

import argparse
import json
import multiprocessing
import multiprocessing.connection
import os
import platform
import queue
import statistics
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from memory.config import TransportConfig
from memory.layout import KVLayout
from memory.pages import PagePool
from memory.transport import TRANSPORTS

LAYOUTS = {
    "bulk": (KVLayout(16, 8, 128, 16, "bfloat16", "hnd"), 256),
    "block": (KVLayout(1, 8, 128, 16, "bfloat16", "hnd"), 16),
}
TIMEOUT_S = 60.0
NAMES = ("tcp", "shared_memory", "torch_distributed", *(["nixl"] if find_spec("nixl") else []))
os.environ.setdefault("UCX_TLS", "tcp")  # NIXL as between hosts without RDMA


def main() -> None:
    """Run the rounds and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds to take medians of, at least 5")
    parser.add_argument("--save", action="store_true", help="also write benchmarks/results/transport.json")
    arguments = parser.parse_args()
    if arguments.rounds < 5:
        parser.error(f"--rounds={arguments.rounds} is not allowed: at least 5")
    result = json.dumps(measure(arguments.rounds), indent=2)
    print(result)
    if arguments.save:
        (Path(__file__).parent / "results" / "transport.json").write_text(result + "\n")


def measure(num_rounds: int) -> dict[str, Any]:
    """All medians, with what they were measured on."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    sender = multiprocessing.get_context("spawn").Process(target=serve_sender, args=(there,), daemon=True)
    sender.start()
    finished: queue.Queue[str] = queue.Queue()
    receivers = {}
    for case, (layout, num_pages) in LAYOUTS.items():
        for name in NAMES:
            receivers[case, name] = TRANSPORTS.get(name).make_receiver(
                PagePool(layout, num_pages),
                make_config(name),
                on_commit=lambda request_id, payload: finished.put(""),
                on_failed=lambda request_id, reason: finished.put(reason),
            )
    source = np.ones(LAYOUTS["bulk"][0].page_bytes * LAYOUTS["bulk"][1], dtype=np.uint8)
    target = np.zeros_like(source)
    seconds: dict[tuple[str, str], list[float]] = {}
    here.recv()  # a lease does not wait for libraries to load
    for round_idx in range(num_rounds + 1):  # the first one warms up
        samples = {("bulk", "memcpy"): copy_seconds(target, source)}
        for key, receiver in receivers.items():
            pages = list(range(LAYOUTS[key[0]][1]))
            here.send((key, receiver.grant(f"round-{round_idx}", pages, page_idxs=pages, num_tokens=len(pages) * 16)))
            if not here.poll(TIMEOUT_S):
                raise TimeoutError(f"{key[1]} did not answer within {TIMEOUT_S:g} s")
            samples[key] = here.recv()
            if reason := finished.get(timeout=TIMEOUT_S):
                raise RuntimeError(reason)
        for key, sample in samples.items():
            seconds.setdefault(key, []).extend([sample] if round_idx else [])
    here.send(None)
    sender.join(TIMEOUT_S)
    for receiver in receivers.values():
        receiver.close()
    return {"machine": describe_machine(), "rounds": num_rounds, **summarise(seconds, len(source))}


def make_config(name: str) -> TransportConfig:
    """As ``configs/transport`` has it."""
    large = {"frame_bytes": "16MiB"} if name in ("torch_distributed", "nixl") else {}
    return TransportConfig(host="127.0.0.1", **large)


def serve_sender(pipe: multiprocessing.connection.Connection) -> None:
    """The sending process: ships what each grant asks for and answers with the seconds it took."""
    senders = {}
    for case, (layout, num_pages) in LAYOUTS.items():
        for name in NAMES:
            pool = TRANSPORTS.get(name).allocate(layout, num_pages)
            pool.storage.random_(0, 256)
            senders[case, name] = TRANSPORTS.get(name).make_sender(pool, make_config(name))
    pipe.send("ready")
    while (order := pipe.recv()) is not None:
        key, grant = order
        answers: queue.Queue[str] = queue.Queue()
        start = time.perf_counter()
        stream = senders[key].open(grant, on_acked=lambda answers=answers: answers.put(""), on_failed=answers.put)
        for layer_idx in range(LAYOUTS[key[0]][0].num_layers):
            stream.send(layer_idx, grant.page_idxs, grant.pages)
        stream.commit(b"")
        if reason := answers.get(timeout=TIMEOUT_S):
            raise RuntimeError(reason)
        pipe.send(time.perf_counter() - start)
    for sender in senders.values():
        sender.close()


def copy_seconds(target: np.ndarray, source: np.ndarray) -> float:
    """Seconds of one copy."""
    start = time.perf_counter()
    np.copyto(target, source)
    return time.perf_counter() - start


def summarise(seconds: dict[tuple[str, str], list[float]], bulk_bytes: int) -> dict[str, Any]:
    """Medians, and the share of the copy's rate that each transport reaches."""
    medians = {key: statistics.median(samples) for key, samples in seconds.items()}
    memcpy = medians["bulk", "memcpy"]
    transports = {
        name: {
            "bulk_gib_per_s": round(bulk_bytes / medians["bulk", name] / 2**30, 3),
            "share_of_memcpy": round(memcpy / medians["bulk", name], 3),
            "block_ms": round(medians["block", name] * 1e3, 3),
        }
        for name in NAMES
    }
    return {
        "bulk_bytes": bulk_bytes,
        "block_bytes": LAYOUTS["block"][0].page_bytes * LAYOUTS["block"][1],
        "memcpy_gib_per_s": round(bulk_bytes / memcpy / 2**30, 3),
        "transports": transports,
    }


def describe_machine() -> dict[str, Any]:
    """Hardware, versions and commit."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=False
    )
    return {
        "cpu": models[0] if models else platform.processor(),
        "num_cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "xxhash": xxhash.VERSION,
        "commit": commit.stdout.strip(),
    }


if __name__ == "__main__":
    main()
