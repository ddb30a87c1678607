"""The grid that every exchange plan must get right: masks x heads x lengths."""

from dataclasses import dataclass
from itertools import product

import torch

from parallel.mask import Mask

MASKS = ("full", "causal", "packed", "window", "packed_window", "cached_prefix", "decode")
HEADS = {"mha": (4, 4), "gqa": (6, 2), "mqa": (4, 1)}
LENGTHS = {"even": 48, "uneven": 53, "short": 2, "batch": 24}
HEAD_DIM = 16


@dataclass(frozen=True, slots=True)
class Cell:
    """One attention to get right."""

    mask_name: str
    heads_name: str
    lengths_name: str

    def __str__(self) -> str:
        return f"{self.mask_name}-{self.heads_name}-{self.lengths_name}"

    @property
    def batch_size(self) -> int:
        return 2 if self.lengths_name == "batch" else 1

    @property
    def num_kv(self) -> int:
        """Keys over all ranks."""
        length = LENGTHS[self.lengths_name]
        return length + 37 if self.mask_name in ("cached_prefix", "decode") else length

    @property
    def num_q(self) -> int:
        """Queries over all ranks."""
        return 1 if self.mask_name == "decode" else LENGTHS[self.lengths_name]

    @property
    def mask(self) -> Mask:
        length = self.num_kv
        bounds = (
            (0, *sorted({1, length // 3, length // 3, length // 2}), length) if "packed" in self.mask_name else None
        )
        return Mask(self.mask_name != "full", 7 if "window" in self.mask_name else None, bounds)

    def make_inputs(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
        """q, k, v and dout of the whole sequence."""
        num_heads, num_kv_heads = HEADS[self.heads_name]
        generator = torch.Generator().manual_seed(hash((self.num_q, self.num_kv, num_heads)) % 2**31)
        shapes = [
            (self.num_q, num_heads),
            (self.num_kv, num_kv_heads),
            (self.num_kv, num_kv_heads),
            (self.num_q, num_heads),
        ]
        return tuple(
            torch.randn(self.batch_size, rows, heads, HEAD_DIM, generator=generator).to(dtype) for rows, heads in shapes
        )


CELLS = tuple(
    Cell(mask, heads, lengths)
    for mask, heads, lengths in product(MASKS, HEADS, LENGTHS)
    if not ("packed" in mask and lengths == "batch")
)


def relative_error(value: torch.Tensor, reference: torch.Tensor, *, least: float = 0.0) -> float:
    """Of the norms; a reference smaller than ``least`` counts as that, so that a gradient of zero can be met."""
    return ((value.double() - reference).norm() / max(reference.norm().item(), least, 1e-12)).item()
