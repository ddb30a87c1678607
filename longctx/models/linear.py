"""Linear layers in the form that is fastest where they run.

On a CPU with bfloat16 products (or for float32), oneDNN's blocked layout reads weights at the memory's full speed at
any batch size (measured 29-38 GB/s against 20-25 for ``F.linear`` at batch 1), and the original tensor is dropped. On a
CPU without them torch multiplies bfloat16 at a sixth of float32's speed: few rows go to our kernel, many to a float32
product of widened weights. On a GPU one row goes to a kernel of ours, the rest is ``F.linear``.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from longctx.kernels.build import NativeBuildError, load_native

Linear = Callable[[torch.Tensor], torch.Tensor]  # [T, in_features] to [T, out_features], in x's dtype

NATIVE_ROWS = 32  # up to here reading the weights binds; beyond, a float32 product is faster than our kernel
NATIVE_MULTIPLE = 32  # of in_features
WIDENED_BYTES = 64 * 2**20  # of float32 weights at one time


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
    """``y = x W^T + b`` with ``weight [out_features, in_features]`` and ``bias [out_features]`` or None.

    Unless ``OneDNNLinear`` is chosen the weight itself is kept: a tied embedding is shared.
    """
    weight = weight.detach()
    bias = None if bias is None else bias.detach().contiguous()
    if weight.device.type == "cpu" and torch.backends.mkldnn.is_available():
        has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and has_bf16):
            return OneDNNLinear(weight, bias)
        if weight.dtype == torch.bfloat16:
            return WideningLinear(weight, bias)
    if weight.is_cuda and find_spec("triton") is not None:
        return GPULinear(weight, bias)
    return lambda x_TC: F.linear(x_TC, weight, bias)


class GPULinear:
    """Weights on a GPU."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        from longctx.models.triton_linear import multiply_one_row

        self.weight, self.bias, self._multiply_one_row = weight.contiguous(), bias, multiply_one_row

    def __call__(self, x_TC: torch.Tensor) -> torch.Tensor:
        if x_TC.shape[0] == 1:
            return self._multiply_one_row(x_TC.contiguous(), self.weight, self.bias)
        return F.linear(x_TC, self.weight, self.bias)


class OneDNNLinear:
    """Weights in oneDNN's blocked layout; CPU, float32 and bfloat16."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        self.bias = bias

    def __call__(self, x_TC: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x_TC, self.weight, self.bias, "none", [], "")


class WideningLinear:
    """bfloat16 weights on a CPU that multiplies only float32."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight, self.bias = weight.contiguous(), bias
        self._num_native_rows = NATIVE_ROWS if weight.shape[1] % NATIVE_MULTIPLE == 0 else 0
        try:
            self._native = load_native().longctx_linear
        except NativeBuildError:  # slower; the attention registry has told why
            self._num_native_rows = 0

    def __call__(self, x_TC: torch.Tensor) -> torch.Tensor:
        x_TC = x_TC.contiguous()
        if x_TC.shape[0] <= self._num_native_rows:
            return self._multiply_few(x_TC)
        return self._multiply_many(x_TC) if x_TC.shape[0] > NATIVE_ROWS else F.linear(x_TC, self.weight, self.bias)

    def _multiply_few(self, x_TC: torch.Tensor) -> torch.Tensor:
        out_features, in_features = self.weight.shape
        y_TC = x_TC.new_empty((x_TC.shape[0], out_features))
        bias = None if self.bias is None else self.bias.data_ptr()
        pointers = (x_TC.data_ptr(), self.weight.data_ptr(), bias, y_TC.data_ptr())
        if self._native(*pointers, x_TC.shape[0], in_features, out_features, torch.get_num_threads()):
            raise MemoryError("a linear layer ran out of memory")
        return y_TC

    def _multiply_many(self, x_TC: torch.Tensor) -> torch.Tensor:
        out_features, in_features = self.weight.shape
        wide_TC = x_TC.float()
        y_TC = x_TC.new_empty((x_TC.shape[0], out_features))
        step = max(1, WIDENED_BYTES // (4 * in_features))
        for start in range(0, out_features, step):
            part = slice(start, start + step)
            bias = None if self.bias is None else self.bias[part].float()
            y_TC[:, part] = F.linear(wide_TC, self.weight[part].float(), bias)
        return y_TC
