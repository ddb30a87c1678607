"""Measures a group's link model: how fast its ranks reach each other, alone and all at once, and how fast they attend.

Collective, and meant for a quiet group: what else runs on the links or the cores is measured along.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from parallel.carrier import Carrier, Message, open_carrier
from parallel.links import LinkModel
from parallel.mask import Tile
from parallel.tile_attention import attend_tile_, choose_kernel

ROUND_S = 0.25  # how long a transfer must take to be measured by
FIRST_BYTES, MOST_BYTES = 1 << 16, 1 << 28
ATTENTION_S = 1.0
WITH_ATTENTION = 2.0  # how long ranks attend beside an exchange, over what it takes alone
NUM_PINGS = 20
NUM_ROUNDS = 3
TIMEOUT_S = 300.0
ATTENTION_SHAPE = (1, 1024, 8, 64)  # [batch, seq, heads, head_dim]
SMALL_LENGTH = 8  # of a tile that takes hardly longer than an empty one would
MIDDLE_LENGTH = 256  # of a tile that is soon done beside messages


@dataclass(frozen=True, slots=True)
class Measurement:
    """A link model and what it was made from.

    Args:
        links: the model.
        node_of: of each rank: ranks with equal names share a node.
        bytes_per_s: rate from rank (row) to rank (column), 0 on the diagonal, each rank sending to one at a time.
        all_at_once: what a rank sends a second to all others together, over what it sends to one.
    """

    links: LinkModel
    node_of: tuple[str, ...]
    bytes_per_s: tuple[tuple[float, ...], ...]
    all_at_once: float

    @property
    def num_nodes(self) -> int:
        """Nodes, for ``num_nodes=``: 1 unless the ranks fill nodes of one size in order."""
        nodes = list(dict.fromkeys(self.node_of))
        size, rest = divmod(len(self.node_of), len(nodes))
        in_order = self.node_of == tuple(node for node in nodes for _ in range(size))
        return len(nodes) if not rest and in_order else 1


def measure_links(group: dist.ProcessGroup | None, *, node: str, device: torch.device | None = None) -> Measurement:
    """Measure the links of ``group``; every rank gets the same answer.

    Args:
        group: the ranks; None is the default group.
        node: name of this rank's machine.
        device: where attention runs; None: the CPU.

    Raises:
        ValueError: for a group of one rank.
    """
    place = device or torch.device("cpu")
    carrier = open_carrier(group, place)
    if carrier.world_size < 2:
        raise ValueError("a group of 1 rank is not allowed: links need 2")
    node_of = tuple(bytes(numbers).rstrip(b"\0").decode(errors="replace") for numbers in _share_name(carrier, node))
    num_bytes = _choose_size(carrier, place)
    shifts = [_Shift(carrier, place, shift) for shift in range(1, carrier.world_size)]
    seconds = _gather(carrier, [_median(shift.seconds(num_bytes) for _ in range(NUM_ROUNDS)) for shift in shifts])
    latencies = _gather(carrier, [_median(shift.seconds(1) for _ in range(NUM_PINGS)) for shift in shifts])
    smallest = _gather(carrier, [_median(_send_to_all(carrier, place, 1) for _ in range(NUM_PINGS))])
    together = _gather(carrier, [_median(_send_to_all(carrier, place, num_bytes) for _ in range(NUM_ROUNDS))])
    slowest_s = max(whole for (whole,) in together)
    attention = _gather(
        carrier, [_measure_attention(carrier, place, length) for length in (ATTENTION_SHAPE[1], SMALL_LENGTH)]
    )
    handling_s = _median(
        own
        for _ in range(NUM_ROUNDS)
        for (own,) in _gather(carrier, [_measure_handling(carrier, place, num_bytes, slowest_s)])
    )
    ratio = _median(sum(alone) / whole for alone, (whole,) in zip(seconds, together, strict=True))
    is_mesh = _median(
        _is_nearer_to_mesh(alone, whole, handling_s) for alone, (whole,) in zip(seconds, together, strict=True)
    )
    within, between = (_median(values) if values else 0.0 for values in _split(seconds, node_of))
    latency_within, latency_between = (_median(values) if values else 0.0 for values in _split(latencies, node_of))
    links = LinkModel(
        topology="mesh" if carrier.world_size > 2 and is_mesh > 0.5 else "switch",
        bytes_per_s=num_bytes / (within or between),
        latency_s=latency_within or latency_between,
        message_s=max(0.0, _median(whole - max(alone) for alone, (whole,) in zip(latencies, smallest, strict=True)))
        / max(1, 2 * (len(shifts) - 1)),  # both ways, beyond the first pair
        node_bytes_per_s=num_bytes / between if within and between else 0.0,
        node_latency_s=latency_between if latency_within else 0.0,
        host_byte_s=handling_s / (2 * len(shifts) * num_bytes),
        tile_s=_median(small for _, small in attention),
        flops_per_s=_attention_flops() / _median(large for large, _ in attention),
    )
    size = carrier.world_size
    matrix = tuple(
        tuple(num_bytes / seconds[rank][(peer - rank) % size - 1] if peer != rank else 0.0 for peer in range(size))
        for rank in range(size)
    )
    return Measurement(links, node_of, matrix, ratio)


class _Shift:
    """Every rank sends to the one ``shift`` behind it, and receives from the one before."""

    def __init__(self, carrier: Carrier, device: torch.device, shift: int) -> None:
        self._carrier, self._device = carrier, device
        self._to = (carrier.rank + shift) % carrier.world_size
        self._source = (carrier.rank - shift) % carrier.world_size

    def seconds(self, num_bytes: int) -> float:
        """From the moment in which all are ready until this rank has sent and received."""
        return _exchange(self._carrier, self._device, [self._to], [self._source], num_bytes)


def _send_to_all(carrier: Carrier, device: torch.device, num_bytes: int) -> float:
    others = [rank for rank in range(carrier.world_size) if rank != carrier.rank]
    return _exchange(carrier, device, others, others, num_bytes)


def _exchange(
    carrier: Carrier,
    device: torch.device,
    to: Sequence[int],
    sources: Sequence[int],
    num_bytes: int,
    meanwhile: Callable[[], None] = lambda: None,
) -> float:
    sends = [Message(torch.zeros(num_bytes, dtype=torch.uint8, device=device), peer, 0) for peer in to]
    receives = [Message(torch.empty(num_bytes, dtype=torch.uint8, device=device), peer, 0) for peer in sources]
    carrier.gather_numbers([0], TIMEOUT_S)
    begun = time.perf_counter()
    sent, received = carrier.post(sends, receives)
    meanwhile()
    for transfer in (*received, *sent):
        transfer.wait(TIMEOUT_S)
        transfer.confirm(TIMEOUT_S)
    return time.perf_counter() - begun


def _choose_size(carrier: Carrier, device: torch.device) -> int:
    """Bytes that take the slowest rank long enough to be measured by."""
    num_bytes, shift = FIRST_BYTES, _Shift(carrier, device, 1)
    while num_bytes < MOST_BYTES:
        slowest = max(own for (own,) in _gather(carrier, [shift.seconds(num_bytes)]))
        if slowest >= ROUND_S:
            break
        num_bytes *= 4 if slowest < ROUND_S / 4 else 2
    return num_bytes


def _is_nearer_to_mesh(alone: Sequence[float], whole: float, handling_s: float) -> bool:
    """Whether a rank that sends to all at once is as fast as links allow, or as a port that they share does.

    Either way it is no faster than the rank's processor handles the bytes, which is what fast links are limited by.
    """
    mesh, switch = max(*alone, handling_s), max(sum(alone), handling_s)
    return whole < (mesh * switch) ** 0.5


def _measure_handling(carrier: Carrier, device: torch.device, num_bytes: int, slowest_s: float) -> float:
    """Seconds of attention that sending to all and receiving from all cost a rank, while all ranks attend."""
    attend = _make_attention(device, MIDDLE_LENGTH)
    alone_s = _measure_attention(carrier, device, MIDDLE_LENGTH)
    others = [rank for rank in range(carrier.world_size) if rank != carrier.rank]
    count = 0

    def attend_meanwhile() -> None:
        nonlocal count
        stop = time.perf_counter() + WITH_ATTENTION * slowest_s
        while count == 0 or time.perf_counter() < stop:
            attend()
            count += 1

    seconds = _exchange(carrier, device, others, others, num_bytes, attend_meanwhile)
    return max(0.0, seconds - count * alone_s)


def _make_attention(device: torch.device, length: int) -> Callable[[], None]:
    """An unmasked tile's attention."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    batch_size, _, num_heads, head_dim = ATTENTION_SHAPE
    kernel = choose_kernel(device, dtype, head_dim)
    q, k, v = (torch.randn(batch_size, length, num_heads, head_dim, device=device, dtype=dtype) for _ in range(3))
    out, lse = q.new_zeros(q.shape, dtype=torch.float32), q.new_zeros(q.shape[:3], dtype=torch.float32)
    tile = Tile(0, length, 0, length)

    def attend() -> None:
        attend_tile_(kernel, tile, q, k, v, out, lse, head_dim**-0.5)
        _synchronize(device)

    attend()  # warms up
    return attend


def _measure_attention(carrier: Carrier, device: torch.device, length: int) -> float:
    """Seconds of an unmasked tile while all ranks are at it: they may share cores."""
    attend = _make_attention(device, length)
    carrier.gather_numbers([0], TIMEOUT_S)
    begun, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - begun < ATTENTION_S:
        attend()
        count += 1
    return (time.perf_counter() - begun) / count


def _attention_flops() -> int:
    batch, length, heads, head_dim = ATTENTION_SHAPE
    return 4 * batch * length * length * heads * head_dim


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _gather(carrier: Carrier, numbers: Sequence[float]) -> list[list[float]]:
    """Every rank's seconds; they travel as nanoseconds."""
    return [[n / 1e9 for n in own] for own in carrier.gather_numbers([round(x * 1e9) for x in numbers], TIMEOUT_S)]


def _share_name(carrier: Carrier, node: str) -> list[list[int]]:
    own = node.encode()[:64]
    return carrier.gather_numbers(list(own.ljust(64, b"\0")), TIMEOUT_S)


def _split(values: Sequence[Sequence[float]], node_of: Sequence[str]) -> tuple[list[float], list[float]]:
    """Values of pairs within a node, and of pairs between nodes; ``values[rank][shift - 1]``."""
    within: list[float] = []
    between: list[float] = []
    for rank, own in enumerate(values):
        for index, value in enumerate(own):
            peer = (rank + index + 1) % len(values)
            (within if node_of[rank] == node_of[peer] else between).append(value)
    return within, between


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)
