"""Which attention implementations there are, and the one place that chooses among them."""

import torch

from longctx.attention.backend import AttentionBackend
from parallel.registry import Registry

ATTENTION = Registry(
    "attention implementation",
    {
        "flash_attn": "longctx.attention.flash_attn:FlashAttention",
        "native": "longctx.attention.native:NativeAttention",
        "triton": "longctx.attention.triton_attention:TritonAttention",
        "torch_flash": "longctx.attention.torch_flash:TorchFlashAttention",
        "torch": "longctx.attention.torch_paged:TorchPagedAttention",
    },
)
PREFERENCE = ("flash_attn", "torch_flash", "triton", "native", "torch")  # what "auto" tries, first to last


def choose_attention(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, *, group_size: int = 1
) -> AttentionBackend:
    """The implementation called ``name``, or for ``"auto"`` the first of ``PREFERENCE`` that can run.

    Raises ``ValueError`` if ``name`` is unknown or cannot run on this device, dtype, head size or number of query heads
    per KV head (``group_size``).
    """
    for candidate in PREFERENCE if name == "auto" else (name,):
        backend = ATTENTION.get(candidate)
        reason = backend.unsupported(device, dtype, head_dim)
        if reason is None and backend.max_group is not None and group_size > backend.max_group:
            reason = f"{group_size} query heads share a KV head; it takes at most {backend.max_group}"
        if reason is None:
            return backend()
        if name != "auto":
            raise ValueError(f"attention implementation {name!r} cannot run here: {reason}")
    raise AssertionError("the torch implementation runs everywhere")
