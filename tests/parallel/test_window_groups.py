"""Windows that reach back to a group's border: both kernels that take them, under every plan and layout."""

import pytest
import torch

from parallel.layout import LAYOUTS
from parallel.mask import Mask
from parallel.plans import PLANS
from parallel.tile_attention import TILE_ATTENTION
from tests.parallel.cells import relative_error
from tests.parallel.dense_reference import dense_attention
from tests.parallel.virtual_ranks import run_virtual_ranks

BOUNDS = (0, 1, 30, 30, 71)
MASKS = (Mask(True, 7, BOUNDS, 3), Mask(True, 1, BOUNDS, 4), Mask(True, 4, None, 4), Mask(True, 60, BOUNDS, 5))


@pytest.mark.parametrize("kernel", ["cpu_flash", "torch_products"])
@pytest.mark.parametrize("plan", list(PLANS))
def test_window_groups_equal_dense_attention(plan, kernel):
    generator = torch.Generator().manual_seed(1)
    inputs = tuple(torch.randn(1, BOUNDS[-1], heads, 16, generator=generator) for heads in (6, 2, 2, 6))
    for index, mask in enumerate(MASKS):
        q, k, v = (x.double().requires_grad_() for x in inputs[:3])
        out, lse = dense_attention(q, k, v, mask, 0.25)
        out.backward(inputs[3].double())
        world_size = 1 + (index + list(PLANS).index(plan)) % 3
        layout = LAYOUTS[(index + list(PLANS).index(plan)) % 4]
        made = TILE_ATTENTION.get(kernel)()
        result = run_virtual_ranks(inputs, mask, plan, world_size=world_size, layout=layout, kernel=made)
        assert relative_error(result.out, out.detach()) <= 2e-6, (mask, layout)
        assert relative_error(result.lse, lse.detach()) <= 2e-6, (mask, layout)
        for gradient, expected in zip(result.gradients, (q.grad, k.grad, v.grad), strict=True):
            assert relative_error(gradient, expected) <= 2e-6, (mask, layout)
