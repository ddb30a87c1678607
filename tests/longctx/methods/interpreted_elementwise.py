"""Run by ``test_method_kernels.py`` under Triton's interpreter, or on a GPU: prints each case's worst errors as JSON.

python -m tests.longctx.methods.interpreted_elementwise [cuda]
"""

import json
import sys

import torch

from longctx.attention.backend import HeadNorm, rms_norm
from longctx.attention.batch import AttentionShape, PackedBatch
from longctx.attention.torch_paged import TorchPagedAttention
from longctx.attention.triton_elementwise import add_rms_norm_rows, rms_norm_rows, rotate_and_store, silu_mul_rows
from tests.longctx.methods.interpreted_paged import make_pool, relative_error

CASES = (  # order, query heads, kv heads, head dim, rotary dim, head norm, tokens
    ("nhd", 4, 2, 16, 16, False, 5),
    ("hnd", 3, 1, 64, 32, True, 1),
    ("nhd", 6, 6, 24, 24, True, 9),
    ("hnd", 2, 1, 80, 40, False, 3),
)
LARGE = (("nhd", 32, 8, 128, 128, False, 2048), ("nhd", 32, 8, 128, 128, True, 777), ("hnd", 8, 4, 256, 128, True, 100))
SIZE = 16


class PlainAttention(TorchPagedAttention):
    """The base class's steps, into pages of either order."""

    def store(self, k_TKD, v_TKD, shape, batch):
        page, offset = batch.slots_T // SIZE, batch.slots_T % SIZE
        for pages, rows in zip(batch.pool.views(shape.layer_idx), (k_TKD, v_TKD), strict=True):
            pages = pages if batch.pool.layout.order == "nhd" else pages.transpose(1, 2)
            pages[page, offset] = rows.to(pages.dtype)


def make_batch(pool, num_tokens, rotary_dim, generator, device):
    slots = torch.randperm(pool.num_pages * SIZE, generator=generator)[:num_tokens].to(device)
    angles = torch.randn(num_tokens, rotary_dim // 2, generator=generator).repeat(1, 2).to(device)
    none = torch.empty(0, dtype=torch.int32, device=device)
    return PackedBatch(
        slots, slots, slots, none, none, none, none, 1, 1, pool, cos_TD=angles.cos(), sin_TD=angles.sin()
    )  # fmt: skip


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    dtypes = (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,)
    worst = {}
    for order, heads, kv_heads, dim, rotary_dim, has_norm, num_tokens in CASES + (LARGE if device == "cuda" else ()):
        for dtype in dtypes:
            generator = torch.Generator().manual_seed(dim)

            def draw(*shape, generator=generator):
                return torch.randn(*shape, generator=generator).to(device)

            shape = AttentionShape(0, heads, kv_heads, dim, dim**-0.5)
            norm = HeadNorm(draw(dim), draw(dim), 1e-5) if has_norm else None
            pools = [make_pool(order, SIZE, kv_heads, dim, dtype, num_tokens, device) for _ in range(2)]
            exact = make_pool(order, SIZE, kv_heads, dim, torch.float32, num_tokens, device)
            for view, wide in zip(pools[0].views(0), exact.views(0), strict=True):
                wide.copy_(view)
            batch = make_batch(pools[0], num_tokens, rotary_dim, generator, device)
            qkv = draw(num_tokens, (heads + 2 * kv_heads) * dim).to(dtype)
            q = rotate_and_store(qkv, norm, shape, batch)
            batch.pool = exact
            errors = [relative_error(q, PlainAttention().prepare(qkv.float(), norm, shape, batch))]
            errors += [relative_error(*pair) for pair in zip(pools[0].views(0), exact.views(0), strict=True)]
            batch.pool, batch.slots_T = pools[1], torch.full_like(batch.slots_T, -1)
            before = pools[1].storage.clone()
            rotate_and_store(qkv, norm, shape, batch)
            assert torch.equal(before, pools[1].storage), "rows without a slot were stored"
            columns = dim * heads
            x, addend, weight = draw(num_tokens, columns).to(dtype), draw(num_tokens, columns).to(dtype), draw(columns)
            errors.append(relative_error(rms_norm_rows(x, weight, 1e-5), rms_norm(x.float(), weight, 1e-5)))
            total = x + addend
            normed = add_rms_norm_rows(x, addend, weight, 1e-5)
            errors += [relative_error(normed, rms_norm(total.float(), weight, 1e-5)), relative_error(x, total)]
            gate, up = qkv.float().chunk(2, dim=-1) if qkv.shape[1] % 2 == 0 else (qkv.float(), qkv.float())
            errors.append(relative_error(silu_mul_rows(torch.cat((gate, up), 1).to(dtype)), gate * gate.sigmoid() * up))
            worst[f"{order} {heads}:{kv_heads} {dim} {rotary_dim} {has_norm} {num_tokens} {dtype}"] = errors
    sys.stdout.write(json.dumps(worst))


if __name__ == "__main__":
    main()
