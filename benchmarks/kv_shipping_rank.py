"""One process of the KV shipping benchmark: a prefill rank, or decode behind the last of them.

Started by ``benchmarks/kv_shipping.py`` in the process' network namespace:

    python -m benchmarks.kv_shipping_rank RANK NUM_RANKS SPECIFICATION.json

Orders and grants go through a gloo group of all; KV goes through ``memory/tcp.py``. Each rank's pages hold numbers of
its own, and decode looks at every page of the first round.
"""

import datetime
import json
import queue
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from memory.config import TransportConfig
from memory.layout import KVLayout
from memory.messages import LeaseGrant
from memory.pages import PagePool
from memory.tcp import TcpTransport
from memory.transport import KVSender

TIMEOUT_S = 120.0
PAGE_SIZE = 16


def main() -> None:
    """Take part in every round."""
    rank, num_ranks, path = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    specification = json.loads(path.read_text())
    num_layers, num_kv_heads, head_dim = specification["layout"]
    layout = KVLayout(num_layers, num_kv_heads, head_dim, PAGE_SIZE, "bfloat16", "hnd")
    num_pages = layout.num_pages(specification["num_tokens"])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{path.parent / 'store'}",
        rank=rank,
        world_size=num_ranks + 1,
        timeout=datetime.timedelta(seconds=TIMEOUT_S),
    )
    if rank == num_ranks:
        seconds = receive(layout, num_pages, specification)
        result = {"seconds": seconds, "num_bytes": layout.page_bytes * num_pages}
        (path.parent / "result.json").write_text(json.dumps(result))
    else:
        ship(layout, num_pages, rank, specification)
    dist.barrier()
    dist.destroy_process_group()


def receive(layout: KVLayout, num_pages: int, specification: dict[str, Any]) -> dict[int, list[float]]:
    """Decode: grant one lease after the other; seconds of each, by the number of ranks that fill it."""
    finished: queue.Queue[str] = queue.Queue()
    pool = PagePool(layout, num_pages)
    receiver = TcpTransport.make_receiver(
        pool,
        TransportConfig(host=specification["address"]),
        on_commit=lambda request_id, payload: finished.put(""),
        on_failed=lambda request_id, reason: finished.put(reason),
    )
    seconds: dict[int, list[float]] = {way: [] for way in specification["ways"]}
    pages = list(range(num_pages))
    for round_idx, ways in enumerate(specification["rounds"]):
        for way in ways:
            grant = receiver.grant(
                f"round-{round_idx}-{way}",
                pages,
                page_idxs=pages,
                num_tokens=num_pages * PAGE_SIZE,
                num_senders=way,
            )
            dist.broadcast_object_list([grant], src=dist.get_rank())
            dist.barrier()
            begun = time.perf_counter()
            if reason := finished.get(timeout=TIMEOUT_S):
                raise RuntimeError(reason)
            if round_idx:
                seconds[way].append(time.perf_counter() - begun)
            else:
                check_pages(pool, way)
            dist.barrier()
    receiver.close()
    return seconds


def ship(layout: KVLayout, num_pages: int, rank: int, specification: dict[str, Any]) -> None:
    """A prefill rank: send what lies with it, layer by layer, where it takes part."""
    pool = TcpTransport.allocate(layout, num_pages)
    for layer_idx in range(layout.num_layers):
        for page in range(num_pages):
            pool.block(layer_idx, page).fill_(make_byte(rank, layer_idx, page))
    sender = TcpTransport.make_sender(pool, TransportConfig())
    for way in (way for ways in specification["rounds"] for way in ways):
        offer: list[Any] = [None]
        dist.broadcast_object_list(offer, src=dist.get_world_size() - 1)
        dist.barrier()
        if rank < way:
            _send(sender, offer[0], layout.num_layers, list(share_of_pages(num_pages, rank, way)))
        dist.barrier()
    sender.close()


def _send(sender: KVSender, grant: LeaseGrant, num_layers: int, pages: list[int]) -> None:
    answers: queue.Queue[str] = queue.Queue()
    stream = sender.open(grant, on_acked=lambda: answers.put(""), on_failed=answers.put)
    for layer_idx in range(num_layers):
        stream.send(layer_idx, pages, pages)
    stream.commit(b"")
    if reason := answers.get(timeout=TIMEOUT_S):
        raise RuntimeError(reason)


def share_of_pages(num_pages: int, rank: int, num_ranks: int) -> range:
    """Pages of the sequence that lie with a rank."""
    return range(num_pages * rank // num_ranks, num_pages * (rank + 1) // num_ranks)


def make_byte(rank: int, layer_idx: int, page: int) -> int:
    """What fills a rank's block."""
    return (page + 37 * rank + 101 * layer_idx) % 256


def check_pages(pool: PagePool, num_ranks: int) -> None:
    """Raise ``RuntimeError`` if a block does not hold what its rank had; then wipe the pages."""
    for rank in range(num_ranks):
        for page in share_of_pages(pool.num_pages, rank, num_ranks):
            for layer_idx in range(pool.layout.num_layers):
                wanted = make_byte(rank, layer_idx, page)
                if not torch.all(pool.block(layer_idx, page) == wanted):
                    raise RuntimeError(f"page {page}, layer {layer_idx} does not hold what rank {rank} sent")
    pool.storage.zero_()


if __name__ == "__main__":
    main()
