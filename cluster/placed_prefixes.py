"""Which prompt prefixes a worker probably still has in its cache: those of the prompts that were placed there last.

An estimate made where requests are placed, as SGLang's router makes it (Zheng et al., 2024): workers say nothing of
their caches. A wrong guess costs time and never a wrong token, as workers look for themselves.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

BLOCK_SIZE = 64  # tokens; a prefix is known in steps of this
DIGEST_BYTES = 16


def digest_prefix(token_ids: Sequence[int], salt: str = "") -> list[bytes]:
    """A digest of each full block of ``token_ids`` and all before it; equal only if these and the salt are."""
    data, step = array("q", token_ids).tobytes(), BLOCK_SIZE * 8
    digest = hashlib.blake2b(salt.encode(), digest_size=DIGEST_BYTES).digest()
    digests = []
    for start in range(0, len(data) - step + 1, step):
        digest = hashlib.blake2b(digest + data[start : start + step], digest_size=DIGEST_BYTES).digest()
        digests.append(digest)
    return digests


class PlacedPrefixes:
    """What one worker has been given."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[bytes, None] = OrderedDict()  # least recently used first

    def count_tokens(self, digests: Sequence[bytes]) -> int:
        """Length of the longest known prefix."""
        known = next((idx for idx, digest in enumerate(digests) if digest not in self._blocks), len(digests))
        return known * BLOCK_SIZE

    def add(self, digests: Sequence[bytes], *, max_tokens: int) -> None:
        """A prompt goes to the worker, whose cache holds ``max_tokens`` tokens: what was used longest ago is out."""
        for digest in reversed(digests):  # a prefix loses its tail before its head
            self._blocks[digest] = None
            self._blocks.move_to_end(digest)
        while len(self._blocks) * BLOCK_SIZE > max_tokens:
            self._blocks.popitem(last=False)

    def clear(self) -> None:
        """The worker has forgotten everything."""
        self._blocks.clear()
