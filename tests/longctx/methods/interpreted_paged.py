"""Run by ``test_method_kernels.py`` under Triton's interpreter, or on a GPU: prints each case's worst errors as JSON.

python -m tests.longctx.methods.interpreted_paged [cuda]
"""

import json
import sys

import torch

from longctx.attention.batch import AttentionShape, HeadPages, KeyRanges
from longctx.attention.range_attention import attend_key_ranges
from longctx.attention.torch_paged import TorchPagedAttention
from longctx.attention.triton_paged import attend_pages_with_triton, attend_ranges_with_triton
from memory.layout import KVLayout
from memory.pages import DTYPES, PagePool

CASES = (  # order, page size, query heads, kv heads, head dim, rows by segment, pages of a table
    ("nhd", 16, 4, 2, 16, (1, 1, 1), 5),
    ("hnd", 16, 6, 2, 64, (7, 0, 33), 6),
    ("nhd", 32, 3, 3, 24, (20,), 4),
    ("hnd", 16, 4, 1, 16, (1, 2), 300),  # long ranges are split
)
LARGE = (
    ("nhd", 256, 32, 8, 128, (1,) * 8, 500),
    ("hnd", 64, 8, 2, 64, (700, 1, 300), 40),
    ("nhd", 256, 8, 4, 256, (100, 1), 30),
    ("hnd", 48, 8, 8, 128, (1, 1, 999), 33),
)


def make_pool(order, page_size, num_kv_heads, head_dim, dtype, num_pages, device):
    name = next(name for name, value in DTYPES.items() if value == dtype)
    pool = PagePool(KVLayout(1, num_kv_heads, head_dim, page_size, name, order), num_pages, device=device)
    for view in pool.views(0):
        view.copy_(torch.randn(view.shape, generator=torch.Generator().manual_seed(page_size)))
    return pool


def relative_error(value, expected):
    seen = torch.isfinite(expected)
    assert torch.equal(seen, torch.isfinite(value))
    difference = (value[seen].double() - expected[seen].double()).norm()
    return (difference / expected[seen].double().norm().clamp_min(1e-9)).item()


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    dtypes = (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,)
    worst = {}
    for order, size, heads, kv_heads, dim, rows, length in CASES + (LARGE if device == "cuda" else ()):
        for dtype in dtypes:
            generator = torch.Generator().manual_seed(length)
            pool = make_pool(order, size, kv_heads, dim, dtype, 2 * length, device)
            shape = AttentionShape(0, heads, kv_heads, dim, dim**-0.5)
            num_rows = sum(rows)
            borders = torch.tensor([0, *rows]).cumsum(0).int().to(device)
            tables = torch.stack([torch.randperm(2 * length, generator=generator)[:length] for _ in rows]).int()
            first = torch.randint(0, length * size, (num_rows,), generator=generator).int()
            last = first + torch.randint(0, length * size, (num_rows,), generator=generator).int()
            last = last.clamp_max(length * size)
            last[::5] = first[::5]  # these see nothing
            ranges = KeyRanges(borders, tables.to(device), first.to(device), last.to(device))
            q = torch.randn(num_rows, heads, dim, generator=generator).to(device, dtype)
            expected = attend_key_ranges(q, shape, ranges, pool, first_kv_head=0)
            out = attend_ranges_with_triton(q, shape, ranges, pool, first_kv_head=0)
            errors = [relative_error(*pair) for pair in zip(out, expected, strict=True)]
            one = q[:, 0].contiguous()
            pages = torch.randperm(2 * length, generator=generator)[: len(rows)]
            seen = HeadPages(borders, pages.to(device), torch.arange(len(rows), device=device) % kv_heads)
            whole = TorchPagedAttention().attend_pages(one, shape, seen, pool)
            errors.append(relative_error(attend_pages_with_triton(one, shape, seen, pool), whole))
            worst[f"{order} {size} {heads}:{kv_heads} {dim} {len(rows)} {dtype}"] = errors
    sys.stdout.write(json.dumps(worst))


if __name__ == "__main__":
    main()
