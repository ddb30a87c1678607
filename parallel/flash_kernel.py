"""What the GPU flash kernels share: a whole tile in one call, masks as ``window_size``, half precision only.

Follows FlashAttention-2 (arXiv 2307.08691) and the flash-attn package's meaning of its arguments: masks are aligned
to the bottom right corner, query i of S sees keys j of L with ``i + L - S - left <= j <= i + L - S + right``, -1 is
unbounded, and so is a bound of L or more. Every tile is such a band: none is cut into blocks and merged again but
where that last rule would show keys that are hidden. What is not here: float32, dropout, FlashAttention-3.

These kernels round the output of every tile to q's dtype, and dQ, dK and dV of every tile too. Merging and adding up
is done in float32, so an error of half a unit in the last place of each tile is left, weighted like the tile: it does
not grow with the number of ranks, but it is above that of ``cpu_flash``, whose partial results are float32.

Legend: B batch, S queries, L keys, H query heads, K KV heads, D head dim.
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from parallel.delta import output_with
from parallel.mask import Tile
from parallel.tile_attention import Block, TileKernel

ALIGNMENT = 16  # bytes: the kernels load vectors of that size


@dataclass(frozen=True, slots=True)
class FlashMask:
    """A block's mask in the kernels' words."""

    left: int
    right: int

    @property
    def is_causal(self) -> bool:
        """Whether it is the diagonal into the bottom right corner and nothing else."""
        return (self.left, self.right) == (-1, 0)


class FlashKernel(TileKernel):
    """Base of the GPU kernels; they override ``unsupported``, ``attend`` and ``differentiate``."""

    def blocks(self, tile: Tile) -> Iterator[Block]:
        num_rows, num_columns = tile.q_stop - tile.q_start, tile.kv_stop - tile.kv_start
        if tile.is_full:
            yield Block(0, num_rows, 0, num_columns)
            return
        row = num_columns - 1 - tile.high  # the first that sees the last key
        right = tile.high - (num_columns - num_rows)
        if row <= 0 or right < num_columns:
            yield Block(0, num_rows, 0, num_columns, low=tile.low, high=tile.high)
            return
        # Of more queries than keys, such a bound hides something, and yet the kernels take it for none.
        yield Block(0, row, 0, num_columns - 1, low=tile.low, high=tile.high)
        first = max(0, row + tile.low)
        yield Block(row, num_rows, first, num_columns, low=row + tile.low - first, high=row + tile.high - first)

    def forward(
        self, q_BSHD: torch.Tensor, k_BLKD: torch.Tensor, v_BLKD: torch.Tensor, block: Block, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = (_readable(x) for x in (q_BSHD, k_BLKD, v_BLKD))
        out_BSHD, lse_BHS = self.attend(q, k, v, make_mask(block), scale)
        return out_BSHD, lse_BHS.transpose(1, 2)

    def backward(
        self,
        dout_BSHD: torch.Tensor,
        q_BSHD: torch.Tensor,
        k_BLKD: torch.Tensor,
        v_BLKD: torch.Tensor,
        lse_BSH: torch.Tensor,
        delta_BSH: torch.Tensor,
        block: Block,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dout, q, k, v = (_readable(x) for x in (dout_BSHD, q_BSHD, k_BLKD, v_BLKD))
        out_BSHD = output_with(delta_BSH[..., None], dout)
        lse_BHS = lse_BSH.transpose(1, 2).contiguous()
        return self.differentiate(dout, q, k, v, out_BSHD, lse_BHS, make_mask(block), scale)

    @abstractmethod
    def attend(
        self, q_BSHD: torch.Tensor, k_BLKD: torch.Tensor, v_BLKD: torch.Tensor, mask: FlashMask, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output ``[B, S, H, D]`` in q's dtype and log-sum-exp ``[B, H, S]`` in float32."""

    @abstractmethod
    def differentiate(
        self,
        dout_BSHD: torch.Tensor,
        q_BSHD: torch.Tensor,
        k_BLKD: torch.Tensor,
        v_BLKD: torch.Tensor,
        out_BSHD: torch.Tensor,
        lse_BHS: torch.Tensor,
        mask: FlashMask,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """dQ, dK and dV in q's dtype; of ``out_BSHD`` only rowsum(dO * O) is right."""


def make_mask(block: Block) -> FlashMask:
    """A block's band. Every row of it sees a key and every column is seen, so neither bound lies outside the corner."""
    num_rows, num_columns = block.q_stop - block.q_start, block.kv_stop - block.kv_start
    if block.is_causal:
        return FlashMask(-1, 0)
    if block.low is None:
        return FlashMask(-1, -1)
    shift = num_columns - num_rows
    assert block.low <= shift <= block.high, block
    left = -1 if block.low <= 1 - num_rows else shift - block.low
    right = -1 if block.high >= num_columns - 1 else block.high - shift
    return FlashMask(left, right)


def refuse_without_gpu(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why no flash kernel can run with these, or None."""
    if device.type != "cuda":
        return f"it runs on a GPU, not on {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if head_dim > 256 or head_dim % 8:
        return f"head_dim is {head_dim}; it takes multiples of 8 up to 256"
    return None


def _readable(x: torch.Tensor) -> torch.Tensor:
    """As the kernels read it. In a message Q and dO lie behind float32 rows, which may end anywhere."""
    if x.stride(-1) == 1 and x.data_ptr() % ALIGNMENT == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)
