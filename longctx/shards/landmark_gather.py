"""Landmarks' keys that ranks hold, on their way to the tables of all others. Whoever is looked at, all can find."""

from collections.abc import Sequence

import torch

from parallel.carrier import Carrier, Message, bytes_of, drive
from parallel.exchange import Wait

FIRST_TAG = 16  # and the layer's number; block_exchange.py's lie before


class LandmarkGather:
    """One layer's keys, under way from when this is made until ``finish``.

    Args:
        carrier: to the other ranks.
        own_LKD: this rank's, contiguous.
        counts: how many each rank has, this one too.
        layer_idx: the layer, which names the messages.
    """

    def __init__(self, carrier: Carrier, own_LKD: torch.Tensor, *, counts: Sequence[int], layer_idx: int) -> None:
        self._carrier, tag = carrier, FIRST_TAG + layer_idx
        peers = [rank for rank in range(carrier.world_size) if rank != carrier.rank]
        self._keys = [own_LKD.new_empty((count, *own_LKD.shape[1:])) for count in counts]
        self._keys[carrier.rank] = own_LKD
        sends = [Message(bytes_of(own_LKD), peer, tag) for peer in peers if len(own_LKD)]
        receives = [Message(bytes_of(self._keys[peer]), peer, tag) for peer in peers if counts[peer]]
        sent, received = carrier.post(sends, receives)
        self._waits = [Wait(transfer, 0) for transfer in (*received, *sent)]

    def finish(self, timeout_s: float) -> torch.Tensor:
        """All ranks' keys ``[L, K, D]``, rank after rank. Raises ``ExchangeError`` if a rank is lost."""
        drive((wait for wait in self._waits), self._carrier.rank, timeout_s)
        return torch.cat(self._keys)
