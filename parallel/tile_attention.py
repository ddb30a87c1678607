"""Attention of one tile: the block kernels that an exchange plan is made of.

A kernel that takes no bands sees rectangles with nothing masked, squares with a causal diagonal, and, for windows,
bands of a few hundred rows; ``decompose`` cuts any tile into these. Which kernel runs is chosen by name or by device.

Legend: B batch, S queries, L keys, H query heads, K KV heads, D head dim.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

from parallel.mask import UNBOUNDED, Stairs, Tile
from parallel.merge import merge_partial_
from parallel.registry import Registry

BAND_ROWS = 512  # rows of a window that share one mask
LOWEST_LSE = -1e30  # of a row that sees nothing: two of them can be merged, which minus infinity cannot

TILE_ATTENTION = Registry(
    "tile attention",
    {
        "cpu_flash": "parallel.cpu_flash:CpuFlash",
        "flash_attn": "parallel.flash_attn:FlashAttn",
        "torch_flash": "parallel.torch_flash:TorchFlash",
        "torch_products": "parallel.torch_products:TorchProducts",
    },
)
PREFERENCE = ("flash_attn", "torch_flash", "cpu_flash")  # what "auto" tries, first to last
STAIRS_PREFERENCE = ("cpu_flash", "torch_products")  # for windows that reach back to a group's border


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a tile: full, causal (row i sees columns up to i; square) or, with ``low`` set, a band."""

    q_start: int
    q_stop: int
    kv_start: int
    kv_stop: int
    is_causal: bool = False
    low: int | None = None  # row i of the block sees columns i + low .. i + high
    high: int = UNBOUNDED
    stairs: Stairs | None = None  # beside a band; counted from the block's corner


class TileKernel(ABC):
    """One block at a time, forward and backward, accumulating in float32 (float64 for float64)."""

    @classmethod
    def unsupported(cls, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why it cannot run with these, or None."""
        return None

    def blocks(self, tile: Tile) -> Iterator[Block]:
        """The calls that a tile takes: blocks that cover its unmasked entries once."""
        return decompose(tile)

    @abstractmethod
    def forward(
        self, q_BSHD: torch.Tensor, k_BLKD: torch.Tensor, v_BLKD: torch.Tensor, block: Block, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output ``[B, S, H, D]`` and log-sum-exp ``[B, S, H]`` of the block.

        The arguments are already cut to the block; query head h reads KV head h // (H / K). The log-sum-exp is in the
        accumulator's dtype; so is the output, or in q's where the kernel rounds it.
        """

    @abstractmethod
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
        """dQ, dK and dV of the block, in a dtype as the output's.

        ``lse_BSH`` is over all keys, ``delta_BSH`` is rowsum(dO * O); both are in the accumulator's dtype.
        """


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """What partial results of ``dtype`` are kept and sent in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def choose_kernel(
    device: torch.device, dtype: torch.dtype, head_dim: int, name: str = "auto", *, has_stairs: bool = False
) -> TileKernel:
    """The kernel ``name``, or for ``auto`` the first of ``PREFERENCE`` that can run; with ``has_stairs`` the first that
    takes tiles with stairs.

    Raises ``ValueError`` if it cannot run on this device, dtype or head size, saying what each kernel takes.
    """
    reasons = []
    preference = STAIRS_PREFERENCE if has_stairs else PREFERENCE
    for candidate in preference if name == "auto" else (name,):
        kernel = TILE_ATTENTION.get(candidate)
        reason = kernel.unsupported(device, dtype, head_dim)
        if reason is None:
            return kernel()
        reasons.append(f"{candidate}: {reason}")
    raise ValueError(
        f"sequence parallel attention on {device.type} in {str(dtype).removeprefix('torch.')} with head_dim {head_dim} "
        f"is not allowed: {'; '.join(reasons)}"
    )


def attend_tile_(
    kernel: TileKernel,
    tile: Tile,
    q_BSHD: torch.Tensor,
    k_BLKD: torch.Tensor,
    v_BLKD: torch.Tensor,
    out_BSHD: torch.Tensor,
    lse_BSH: torch.Tensor,
    scale: float,
) -> None:
    """Merge a tile's attention into ``out_BSHD`` and ``lse_BSH``; all arguments are cut to the tile."""
    for block in kernel.blocks(tile):
        rows, columns = slice(block.q_start, block.q_stop), slice(block.kv_start, block.kv_stop)
        partial = kernel.forward(q_BSHD[:, rows], k_BLKD[:, columns], v_BLKD[:, columns], block, scale)
        merge_partial_(out_BSHD[:, rows], lse_BSH[:, rows], *partial)


def differentiate_tile_(
    kernel: TileKernel,
    tile: Tile,
    dout_BSHD: torch.Tensor,
    q_BSHD: torch.Tensor,
    k_BLKD: torch.Tensor,
    v_BLKD: torch.Tensor,
    lse_BSH: torch.Tensor,
    delta_BSH: torch.Tensor,
    dq_BSHD: torch.Tensor,
    dk_BLKD: torch.Tensor,
    dv_BLKD: torch.Tensor,
    scale: float,
) -> None:
    """Add a tile's gradients to ``dq_BSHD``, ``dk_BLKD`` and ``dv_BLKD``; all arguments are cut to the tile."""
    for block in kernel.blocks(tile):
        rows, columns = slice(block.q_start, block.q_stop), slice(block.kv_start, block.kv_stop)
        dq, dk, dv = kernel.backward(
            dout_BSHD[:, rows],
            q_BSHD[:, rows],
            k_BLKD[:, columns],
            v_BLKD[:, columns],
            lse_BSH[:, rows],
            delta_BSH[:, rows],
            block,
            scale,
        )
        dq_BSHD[:, rows] += dq
        dk_BLKD[:, columns] += dk
        dv_BLKD[:, columns] += dv


def decompose(tile: Tile) -> Iterator[Block]:
    """Blocks that cover the tile's unmasked entries once, in rows and columns counted from its corner."""
    num_rows, num_columns = tile.q_stop - tile.q_start, tile.kv_stop - tile.kv_start
    if tile.is_full:
        yield Block(0, num_rows, 0, num_columns)
    elif tile.low == -UNBOUNDED and tile.stairs is None:
        yield from _decompose_causal(num_rows, num_columns, tile.high)
    else:
        yield from _decompose_band(num_rows, num_columns, tile)


def split_heads(heads: tuple[int, int], group_size: int) -> list[tuple[slice, slice]]:
    """Query heads and the KV heads they read, both counted from the first, in runs of equal heads per KV head."""
    first, stop = heads
    kv_first = first // group_size
    whole = min(stop, -(-first // group_size) * group_size), max(first, stop // group_size * group_size)
    cuts = sorted({first, stop, *whole})
    return [
        (slice(low - first, high - first), slice(low // group_size - kv_first, -(-high // group_size) - kv_first))
        for low, high in pairwise(cuts)
    ]


def _decompose_causal(num_rows: int, num_columns: int, high: int) -> Iterator[Block]:
    """Row i sees columns up to i + high: a rectangle, a square with a diagonal, and rows that see everything."""
    square = min(num_rows, num_columns - high)
    if high:
        yield Block(0, square, 0, high)
    yield Block(0, square, high, high + square, is_causal=True)
    if square < num_rows:
        yield Block(square, num_rows, 0, num_columns)


def make_block_mask(block: Block, device: torch.device) -> torch.Tensor | None:
    """Bool ``[S, L]`` of a band's hidden entries; None where a block is none."""
    if block.low is None:
        return None
    row = torch.arange(block.q_stop - block.q_start, device=device)[:, None]
    column = torch.arange(block.kv_stop - block.kv_start, device=device)[None]
    hidden = (column < row + block.low) | (column > row + block.high)
    if (stairs := block.stairs) is not None:
        edge = (stairs.q_position + row * stairs.step + 1 - stairs.window).div(stairs.group, rounding_mode="floor")
        hidden |= stairs.kv_position + column * stairs.step < edge * stairs.group
    return hidden


def clear_empty_rows_(is_empty_S: torch.Tensor, out_BSHD: torch.Tensor, lse_BSH: torch.Tensor) -> None:
    """Make rows that see nothing count nothing in a merge, whatever comes before or after."""
    out_BSHD[:, is_empty_S] = 0
    lse_BSH[:, is_empty_S] = LOWEST_LSE


def _decompose_band(num_rows: int, num_columns: int, tile: Tile) -> Iterator[Block]:
    for first in range(0, num_rows, BAND_ROWS):
        end = min(first + BAND_ROWS, num_rows)
        left, right = max(0, first + tile.low), min(num_columns, end + tile.high)
        shift = left - first
        stairs = None if tile.stairs is None else tile.stairs.cut(first, left)
        yield Block(first, end, left, right, low=tile.low - shift, high=tile.high - shift, stairs=stairs)
