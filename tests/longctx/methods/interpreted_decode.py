"""Run by ``test_method_kernels.py`` under Triton's interpreter, or on a GPU: prints each case's worst errors as JSON.

python -m tests.longctx.methods.interpreted_decode [cuda]
"""

import json
import sys

import torch

from longctx.attention.batch import AttentionShape, KeyRanges
from longctx.attention.range_attention import attend_key_ranges
from longctx.attention.triton_decode import attend_newest
from tests.longctx.methods.interpreted_paged import make_pool, relative_error

CASES = (  # order, page size, query heads, kv heads, head dim, window, keys by sequence
    ("nhd", 16, 4, 2, 16, None, (1, 16, 75)),
    ("hnd", 7, 6, 2, 24, 40, (700, 3, 41)),
    ("nhd", 64, 3, 3, 64, None, (1000,)),
    ("hnd", 16, 20, 1, 16, 300, (299, 300, 301)),
)
LARGE = (
    ("nhd", 64, 32, 8, 128, None, (1,)),
    ("nhd", 64, 32, 8, 128, None, (33000,)),
    ("nhd", 256, 32, 8, 128, 4096, (5000, 1, 64, 9000)),
    ("nhd", 64, 64, 8, 128, None, tuple(range(1, 700, 50))),
    ("hnd", 64, 8, 4, 256, None, (300, 64)),
    ("nhd", 64, 28, 4, 80, 100, (300, 64, 1999)),
)


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    dtypes = (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,)
    worst = {}
    for order, size, heads, kv_heads, dim, window, lengths in CASES + (LARGE if device == "cuda" else ()):
        for dtype in dtypes:
            generator = torch.Generator().manual_seed(dim)
            num_rows, num_pages = len(lengths), -(-max(lengths) // size) + 1
            pool = make_pool(order, size, kv_heads, dim, dtype, num_rows * num_pages, device)
            shape = AttentionShape(0, heads, kv_heads, dim, dim**-0.5, window)
            tables = torch.randperm(num_rows * num_pages, generator=generator).view(num_rows, num_pages).int()
            kv_lens = torch.tensor(lengths, dtype=torch.int32)
            first = (kv_lens - (window or kv_lens.max())).clamp_min(0)
            borders = torch.arange(num_rows + 1, dtype=torch.int32)
            ranges = KeyRanges(*(x.to(device) for x in (borders, tables, first, kv_lens)))
            q = torch.randn(num_rows, heads, dim, generator=generator).to(device, dtype)
            expected = attend_key_ranges(q, shape, ranges, pool, first_kv_head=0)[0].flatten(1)
            errors = []
            for most in (max(lengths), 100_000):
                out = attend_newest(q, shape, pool, ranges.block_tables_BP, ranges.last_S, max_kv_len=most)
                errors.append(relative_error(out, expected))
            worst[f"{order} {size} {heads}:{kv_heads} {dim} {window} {max(lengths)} {dtype}"] = errors
    sys.stdout.write(json.dumps(worst))


if __name__ == "__main__":
    main()
