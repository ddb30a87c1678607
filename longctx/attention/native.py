"""Paged attention for CPUs through our own C kernels (``longctx/kernels``), without a copy of KV.

One structure of pointers is filled once per batch and patched per layer, so that a call costs microseconds. Left out:
float16 (a CPU serves it as float32), head sizes that are no multiple of 16.
"""

import ctypes

import torch

from longctx.attention.backend import AttentionBackend, HeadNorm
from longctx.attention.batch import AttentionShape, PackedBatch
from longctx.kernels.build import NativeBuildError, load_native

MAX_HEAD_DIM = 256
MAX_GROUP = 96  # query heads per KV head
LANES = 16


class _LayerArgs(ctypes.Structure):
    """``layer_args`` of attention.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("qkv", "q_weight", "k_weight", "cos", "sin", "slots", "q", "out")),
        *((name, ctypes.c_void_p) for name in ("k_pages", "v_pages", "cu_seqlens", "kv_lens", "tables")),
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
    kv_order = "paired"
    page_sizes = (64, 32, 16, 48, 80, 96, 112, 128, 256)

    def __init__(self) -> None:
        library = load_native()
        self._prepare, self._attend = library.longctx_prepare, library.longctx_attend
        self._rms_norm, self._silu_mul = library.longctx_rms_norm, library.longctx_silu_mul
        self._args = _LayerArgs()
        self._args_pointer = ctypes.addressof(self._args)
        self._batch: PackedBatch | None = None
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

    def forward(
        self, qkv_TC: torch.Tensor, norm: HeadNorm | None, shape: AttentionShape, batch: PackedBatch
    ) -> torch.Tensor:
        args = self._bind(qkv_TC, shape, batch)
        if norm is None:
            args.q_weight = args.k_weight = None
        else:
            args.q_weight, args.k_weight = norm.q_weight.data_ptr(), norm.k_weight.data_ptr()
            args.norm_eps = norm.eps
        args.qkv = qkv_TC.data_ptr()
        self._prepare(self._args_pointer)
        if batch.on_layer is not None:
            batch.on_layer(shape.layer_idx)
        if self._attend(self._args_pointer):
            raise MemoryError("attention ran out of memory")
        return self._out

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
        raise NotImplementedError("native attention stores in forward")

    def attend(self, q_THD: torch.Tensor, shape: AttentionShape, batch: PackedBatch) -> torch.Tensor:
        raise NotImplementedError("native attention attends in forward")

    @staticmethod
    def _norm_tail(x_TC: torch.Tensor, eps: float) -> tuple[int, int, float, bool, int]:
        """The last arguments of ``longctx_rms_norm``."""
        return x_TC.shape[0], x_TC.shape[1], eps, x_TC.dtype == torch.bfloat16, torch.get_num_threads()

    def _bind(self, qkv_TC: torch.Tensor, shape: AttentionShape, batch: PackedBatch) -> _LayerArgs:
        """Fill what a batch and a layer fix; ``qkv`` and the head norm are the caller's."""
        args, layout = self._args, batch.pool.layout
        if batch is not self._batch or args.num_heads != shape.num_heads:
            assert batch.cos_TD is not None and batch.sin_TD is not None
            assert batch.block_tables_BP.stride(1) == 1 and layout.page_size % LANES == 0
            num_tokens = qkv_TC.shape[0]
            self._batch = batch
            self._q = qkv_TC.new_empty((num_tokens, shape.num_heads * shape.head_dim))
            self._out = torch.empty_like(self._q)
            args.q, args.out = self._q.data_ptr(), self._out.data_ptr()
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
            args.is_bf16, args.num_threads = qkv_TC.dtype == torch.bfloat16, torch.get_num_threads()
            args.scale = shape.scale
        args.window = shape.window or 0
        base = batch.pool.storage.data_ptr() + shape.layer_idx * batch.pool.num_pages * layout.block_bytes
        args.k_pages, args.v_pages = base, base + layout.block_bytes // 2
        return args
