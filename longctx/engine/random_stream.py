"""Uniform numbers as a pure function of (seed, sequence index, token position).

A counter-based stream (the idea of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): what a sequence
draws does not depend on what else is in the batch, on preemption, or on which worker draws it.
"""

import hashlib
import struct

_MASK = (1 << 64) - 1


def draw_uniform(seed: int, index: int, position: int) -> float:
    """A float in [0, 1) with 53 random bits."""
    counter = struct.pack("<QQQ", seed & _MASK, index, position)
    bits = int.from_bytes(hashlib.blake2b(counter, digest_size=8).digest(), "little")
    return (bits >> 11) * 2.0**-53
