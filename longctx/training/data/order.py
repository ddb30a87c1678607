"""In which order rows are read, over all epochs. No torch here.

Row number ``n`` of the endless order is row ``n % num_rows`` of epoch ``n // num_rows``, and each epoch is a
permutation of its own. It is computed, never stored: a Feistel network over a domain somewhat larger than the number
of rows (Luby and Rackoff, 1988), entered again until it ends inside (Black and Rogaway, 2002, "cycle walking").
"""

from dataclasses import dataclass

_NUM_ROUNDS = 6
_MIN_HALF_BITS = 3  # fewer give few different orders
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class RowOrder:
    """The endless order of rows, which a row number says all about."""

    num_rows: int
    shuffle: bool
    seed: int

    def row_idx(self, row_number: int) -> int:
        """Which row comes at ``row_number``."""
        epoch, position = divmod(row_number, self.num_rows)
        if not self.shuffle:
            return position
        half_bits = max(_MIN_HALF_BITS, ((self.num_rows - 1).bit_length() + 1) // 2)
        key = _mix(_mix(self.seed) + epoch)
        position = _permute(position, key, half_bits)
        while position >= self.num_rows:
            position = _permute(position, key, half_bits)
        return position


def _permute(position: int, key: int, half_bits: int) -> int:
    half_mask = (1 << half_bits) - 1
    left, right = position >> half_bits, position & half_mask
    for round_idx in range(_NUM_ROUNDS):
        left, right = right, left ^ (_mix(key + (round_idx << 56) + right) & half_mask)
    return left << half_bits | right


def _mix(number: int) -> int:
    """The finaliser of SplitMix64 (Steele et al., 2014): 64 bits that depend on all bits of ``number``."""
    number = (number + 0x9E3779B97F4A7C15) & _MASK
    number = ((number ^ number >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    number = ((number ^ number >> 27) * 0x94D049BB133111EB) & _MASK
    return number ^ number >> 31
