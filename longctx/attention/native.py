"""Paged attention for CPUs through our own C kernels (``longctx/kernels``), without a copy of KV.

One structure of pointers is filled once per batch and patched per layer, so that a call costs microseconds. Left out:
float16 (a CPU serves it as float32), head sizes that are no multiple of 16.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import replace

import torch

from longctx.attention.backend import AttentionBackend, HeadNorm
from longctx.attention.batch import AttentionShape, HeadPages, KeyRanges, PackedBatch
from longctx.kernels.build import NativeBuildError, load_native
from memory.layout import KVLayout
from memory.page_rows import write_rows
from memory.pages import DTYPES, PagePool

MAX_HEAD_DIM = 256
MAX_GROUP = 96  # query heads per KV head: TILE_ROWS of attention.c
LANES = 16


class _LayerArgs(ctypes.Structure):
    """``layer_args`` of attention.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("qkv", "q_weight", "k_weight", "cos", "sin", "slots", "q", "out")),
        *((name, ctypes.c_void_p) for name in ("k_pages", "v_pages", "cu_seqlens", "kv_lens", "tables")),
        *((name, ctypes.c_void_p) for name in ("first_keys", "last_keys", "lse")),
        ("page_stride", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("num_tokens", "num_segments", "num_heads", "num_kv_heads", "head_dim")),
        *(
            (name, ctypes.c_int32)
            for name in ("rotary_dim", "page_size", "table_stride", "window", "is_bf16", "num_threads")
        ),
        ("scale", ctypes.c_float),
        ("norm_eps", ctypes.c_float),
    )


class NativeAttention(AttentionBackend):
    """CPU, float32 and bfloat16, head sizes that are multiples of 16 up to 256."""

    name = "native"
    max_group = MAX_GROUP
    kv_order = "paired"
    page_sizes = (64, 32, 16, 48, 80, 96, 112, 128, 256)

    def __init__(self) -> None:
        library = load_native()
        self._prepare, self._attend = library.longctx_prepare, library.longctx_attend
        self._rms_norm, self._silu_mul = library.longctx_rms_norm, library.longctx_silu_mul
        self._args = _LayerArgs()
        self._args_pointer = ctypes.addressof(self._args)
        self._batch: PackedBatch | None = None
        self._shape: AttentionShape | None = None
        self._q = self._out = torch.empty(0)

    @classmethod
    def unsupported(cls, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if device.type != "cpu":
            return f"it runs on a CPU, not on {device.type}"
        if dtype not in (torch.float32, torch.bfloat16):
            return f"it takes float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
        if head_dim % LANES or head_dim > MAX_HEAD_DIM:
            return f"head_dim is {head_dim}; it takes multiples of {LANES} up to {MAX_HEAD_DIM}"
        try:
            load_native()
        except NativeBuildError as error:
            return str(error)
        return None

    def prepare(
        self, qkv_TC: torch.Tensor, norm: HeadNorm | None, shape: AttentionShape, batch: PackedBatch
    ) -> torch.Tensor:
        """As the base class says; the queries are valid until the next call."""
        args = self._bind(qkv_TC, shape, batch)
        if norm is None:
            args.q_weight = args.k_weight = None
        else:
            args.q_weight, args.k_weight = norm.q_weight.data_ptr(), norm.k_weight.data_ptr()
            args.norm_eps = norm.eps
        args.qkv, args.q = qkv_TC.data_ptr(), self._q.data_ptr()
        self._prepare(self._args_pointer)
        return self._q

    def attend(self, q_THD: torch.Tensor, shape: AttentionShape, batch: PackedBatch) -> torch.Tensor:
        """As the base class says; the output is valid until the next call."""
        args, q_THD = self._bind(q_THD, shape, batch), q_THD.contiguous()
        args.q = q_THD.data_ptr()
        self._run_attend(self._args_pointer)
        return self._out

    def attend_ranges(
        self,
        q_SHD: torch.Tensor,
        shape: AttentionShape,
        ranges: KeyRanges,
        pool: PagePool,
        *,
        first_kv_head: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layout = pool.layout
        addresses = [address + first_kv_head * layout.head_bytes for address in _page_addresses(pool, shape.layer_idx)]
        return self._attend_at(q_SHD, shape, ranges, layout, addresses, page_stride=layout.block_bytes)

    def attend_pages(self, q_SD: torch.Tensor, shape: AttentionShape, seen: HeadPages, pool: PagePool) -> torch.Tensor:
        # One head of a page is a page as well, in a pool whose pages begin at every row of every head.
        layout, first_S = pool.layout, torch.zeros(len(q_SD), dtype=torch.int32)
        rows_per_block = layout.block_bytes // layout.row_bytes
        assert pool.num_pages * rows_per_block < 1 << 31
        table = (seen.pages_B * rows_per_block + seen.kv_heads_B * layout.page_size).int()[:, None]
        ranges = KeyRanges(seen.cu_seqlens_B1, table, first_S, first_S + layout.page_size)
        one_head, addresses = replace(shape, num_heads=1, num_kv_heads=1), _page_addresses(pool, shape.layer_idx)
        stride = layout.row_bytes
        return self._attend_at(q_SD[:, None], one_head, ranges, layout, addresses, page_stride=stride)[0][:, 0]

    def _attend_at(
        self,
        q_SHD: torch.Tensor,
        shape: AttentionShape,
        ranges: KeyRanges,
        layout: KVLayout,
        addresses: Sequence[int],
        *,
        page_stride: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``attend_ranges``; ``addresses`` are of K and V of page 0, ``page_stride`` bytes from page to page."""
        q_SHD = q_SHD.contiguous()
        indices = (ranges.cu_seqlens_B1, ranges.first_S, ranges.last_S, ranges.block_tables_BP)
        assert all(index.dtype == torch.int32 and index.stride(-1) == 1 for index in indices)
        assert q_SHD.dtype == DTYPES[layout.dtype] and layout.page_size % LANES == 0
        out_SHD = torch.empty(q_SHD.shape, dtype=torch.float32)
        lse_SH = torch.empty(q_SHD.shape[:2], dtype=torch.float32)
        args = _LayerArgs(
            q=q_SHD.data_ptr(),
            out=out_SHD.data_ptr(),
            lse=lse_SH.data_ptr(),
            k_pages=addresses[0],
            v_pages=addresses[1],
            cu_seqlens=ranges.cu_seqlens_B1.data_ptr(),
            tables=ranges.block_tables_BP.data_ptr(),
            table_stride=ranges.block_tables_BP.stride(0),
            first_keys=ranges.first_S.data_ptr(),
            last_keys=ranges.last_S.data_ptr(),
            num_segments=ranges.cu_seqlens_B1.shape[0] - 1,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            page_size=layout.page_size,
            page_stride=page_stride,
            is_bf16=q_SHD.dtype == torch.bfloat16,
            num_threads=torch.get_num_threads(),
            scale=shape.scale,
        )
        self._run_attend(ctypes.addressof(args))
        return out_SHD, lse_SH

    def rms_norm(self, x_TC: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        if x_TC.shape[-1] % LANES:
            return super().rms_norm(x_TC, weight, eps)
        out = torch.empty_like(x_TC)
        self._rms_norm(x_TC.data_ptr(), None, weight.data_ptr(), out.data_ptr(), *self._norm_tail(x_TC, eps))
        return out

    def add_rms_norm(
        self, x_TC: torch.Tensor, addend_TC: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        if x_TC.shape[-1] % LANES:
            return super().add_rms_norm(x_TC, addend_TC, weight, eps)
        out = torch.empty_like(x_TC)
        self._rms_norm(
            x_TC.data_ptr(), addend_TC.data_ptr(), weight.data_ptr(), out.data_ptr(), *self._norm_tail(x_TC, eps)
        )
        return out

    def silu_mul(self, gate_up_TC: torch.Tensor) -> torch.Tensor:
        num_tokens, size = gate_up_TC.shape[0], gate_up_TC.shape[1] // 2
        if size % LANES:
            return super().silu_mul(gate_up_TC)
        out = gate_up_TC.new_empty((num_tokens, size))
        is_bf16 = gate_up_TC.dtype == torch.bfloat16
        self._silu_mul(gate_up_TC.data_ptr(), out.data_ptr(), num_tokens, size, is_bf16, torch.get_num_threads())
        return out

    def store(self, k_TKD: torch.Tensor, v_TKD: torch.Tensor, shape: AttentionShape, batch: PackedBatch) -> None:
        write_rows(batch.pool, shape.layer_idx, batch.slots_T, k_TKD, v_TKD)

    def _run_attend(self, args_pointer: int) -> None:
        if self._attend(args_pointer):
            raise MemoryError("attention ran out of memory")

    @staticmethod
    def _norm_tail(x_TC: torch.Tensor, eps: float) -> tuple[int, int, float, bool, int]:
        """The last arguments of ``longctx_rms_norm``."""
        return x_TC.shape[0], x_TC.shape[1], eps, x_TC.dtype == torch.bfloat16, torch.get_num_threads()

    def _bind(self, rows: torch.Tensor, shape: AttentionShape, batch: PackedBatch) -> _LayerArgs:
        """Fill what a batch and a layer fix; ``rows`` has the batch's length and dtype."""
        args, layout = self._args, batch.pool.layout
        if batch is self._batch and shape is self._shape:
            return args
        if batch is not self._batch or args.num_heads != shape.num_heads:
            assert batch.cos_TD is not None and batch.sin_TD is not None
            assert batch.block_tables_BP.stride(1) == 1 and layout.page_size % LANES == 0
            num_tokens = rows.shape[0]
            self._batch = batch
            self._q = rows.new_empty((num_tokens, shape.num_heads, shape.head_dim))
            self._out = rows.new_empty((num_tokens, shape.num_heads * shape.head_dim))
            args.out = self._out.data_ptr()
            args.cos, args.sin, args.rotary_dim = (
                batch.cos_TD.data_ptr(),
                batch.sin_TD.data_ptr(),
                batch.cos_TD.shape[1],
            )
            args.slots, args.cu_seqlens = batch.slots_T.data_ptr(), batch.cu_seqlens_B1.data_ptr()
            args.kv_lens, args.tables = batch.kv_lens_B.data_ptr(), batch.block_tables_BP.data_ptr()
            args.table_stride = batch.block_tables_BP.stride(0)
            args.num_tokens, args.num_segments, args.page_size = num_tokens, batch.num_segments, layout.page_size
            args.num_heads, args.num_kv_heads, args.head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
            args.page_stride = layout.block_bytes
            args.is_bf16, args.num_threads = rows.dtype == torch.bfloat16, torch.get_num_threads()
            args.scale = shape.scale
        args.window = shape.window or 0
        args.k_pages, args.v_pages = _page_addresses(batch.pool, shape.layer_idx)
        self._shape = shape
        return args


def _page_addresses(pool: PagePool, layer_idx: int) -> tuple[int, int]:
    """Where K and V of one layer's page 0 lie."""
    address = pool.storage[layer_idx].data_ptr()
    return address, address + pool.layout.v_offset
