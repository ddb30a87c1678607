"""The GPU implementations' calls, checked on a CPU: the kernels are replaced by their documented meaning in fp64.

What this cannot show is that the kernels themselves run; the ``gpu`` tests do.
"""

import math
import sys
from types import ModuleType

import pytest
import torch

from longctx.attention.batch import AttentionShape, KeyRanges, PackedBatch
from longctx.attention.registry import ATTENTION
from longctx.attention.torch_paged import TorchPagedAttention
from memory.layout import KVLayout
from memory.pages import PagePool

PAGE_SIZE = 256
STEPS = ([(0, 598), (0, 10)], [(598, 1), (10, 1)], [(599, 1), (11, 19)])  # prompts, decode, both


def attend_documented(q_THD, k_pages, v_pages, *, q_lens, kv_lens, tables, scale, window):
    """Bottom-right aligned attention over paged KV, as flash-attn documents ``window_size`` and ``block_table``."""
    left, right = window
    outs = []
    for q, kv_len, table in zip(q_THD.split(q_lens), kv_lens, tables, strict=True):
        k, v = (pages[table.long()].flatten(0, 1)[:kv_len].double() for pages in (k_pages, v_pages))
        group = q.shape[1] // k.shape[1]
        scores = torch.einsum("qhd,khd->hqk", q.double(), k.repeat_interleave(group, 1)) * scale
        query = torch.arange(len(q))[:, None] + kv_len - len(q)
        key = torch.arange(kv_len)[None]
        seen = key <= query + right
        if left >= 0:
            seen &= key >= query - left
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
        outs.append(torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(group, 1)))
    return torch.cat(outs).to(q_THD.dtype)


def varlen_documented(
    q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size, block_table
):
    q_lens, kv_lens = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    assert causal and max_seqlen_q == max(q_lens) and max_seqlen_k == max(kv_lens) and cu_seqlens_k.dtype == torch.int32
    return attend_documented(
        q, k, v, q_lens=q_lens, kv_lens=kv_lens, tables=block_table, scale=softmax_scale, window=window_size
    )


def with_kvcache_documented(
    q,
    k,
    v,
    *,
    cache_seqlens,
    block_table,
    softmax_scale,
    causal,
    window_size=(-1, -1),
    return_softmax_lse=False,
):
    assert q.shape[1] == 1 and cache_seqlens.dtype == block_table.dtype == torch.int32
    if return_softmax_lse:
        assert not causal and window_size == (-1, -1)
        return partial_documented(q[:, 0], k, v, cache_seqlens.tolist(), block_table, softmax_scale)
    assert causal
    out = attend_documented(
        q[:, 0],
        k,
        v,
        q_lens=[1] * len(q),
        kv_lens=cache_seqlens.tolist(),
        tables=block_table,
        scale=softmax_scale,
        window=window_size,
    )
    return out[:, None]


def partial_documented(q_SHD, k_pages, v_pages, kv_lens, tables, scale):
    """Output ``[S, 1, H, D]`` and log-sum-exp ``[S, H, 1]``; for no keys, something that no one may use."""
    outs, lses = [], []
    for q, kv_len, table in zip(q_SHD.double(), kv_lens, tables, strict=True):
        k, v = (pages[table.long()].flatten(0, 1)[:kv_len].double() for pages in (k_pages, v_pages))
        k, v = (x.repeat_interleave(len(q) // k_pages.shape[2], 1) for x in (k, v))
        scores = torch.einsum("hd,khd->hk", q, k) * scale
        outs.append(torch.einsum("hk,khd->hd", scores.softmax(-1), v) if kv_len else torch.full_like(q, math.nan))
        lses.append(scores.logsumexp(-1) if kv_len else torch.full_like(q[:, 0], math.inf))
    return torch.stack(outs)[:, None].to(q_SHD.dtype), torch.stack(lses)[..., None].float()


def torch_flash_documented(
    q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, dropout, is_causal, debug, *, scale, window_size_left,
    window_size_right, seqused_k,
):  # fmt: skip
    """Keys of a segment lie one after another from ``cu_seq_k`` on, ``seqused_k`` of them."""
    assert is_causal and not dropout and not debug
    assert cu_seq_q.dtype == cu_seq_k.dtype == seqused_k.dtype == torch.int32 and cu_seq_k[-1] == len(k) == len(v)
    starts, kv_lens, q_lens = cu_seq_k.tolist(), seqused_k.tolist(), cu_seq_q.diff().tolist()
    assert max_q == max(q_lens) and max_k == max(kv_lens) and cu_seq_q[0] == starts[0] == 0
    assert all(n <= stop - start for n, start, stop in zip(kv_lens, starts, starts[1:], strict=False))
    rows = [torch.arange(start, start + n) for start, n in zip(starts, kv_lens, strict=False)]
    single = k[:, None], v[:, None]  # pages of one token
    window = window_size_left, window_size_right
    return attend_documented(
        q, *single, q_lens=q_lens, kv_lens=kv_lens, tables=rows, scale=scale, window=window
    ), None  # fmt: skip


def newest_documented(q, shape, pool, tables, kv_lens, *, max_kv_len):
    assert len(q) == len(tables) == len(kv_lens) and max(kv_lens) <= max_kv_len
    window = (-1 if shape.window is None else shape.window - 1, 0)
    return attend_documented(
        q, *pool.views(shape.layer_idx), q_lens=[1] * len(q), kv_lens=kv_lens.tolist(), tables=tables,
        scale=shape.scale, window=window,
    ).flatten(1)  # fmt: skip


@pytest.fixture
def documented_kernels(monkeypatch):
    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = varlen_documented
    module.flash_attn_with_kvcache = with_kvcache_documented
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr("longctx.attention.torch_flash._flash", torch_flash_documented)
    decode = ModuleType("longctx.attention.triton_decode")  # without importing Triton
    decode.attend_newest = newest_documented
    monkeypatch.setitem(sys.modules, "longctx.attention.triton_decode", decode)


@pytest.mark.usefixtures("documented_kernels")
@pytest.mark.parametrize("name", ["flash_attn", "torch_flash", "triton"])
@pytest.mark.parametrize("window", [None, 300])
def test_calls_mean_causal_paged_attention(name, window):
    torch.manual_seed(0)
    backend, oracle = ATTENTION.get(name)(), TorchPagedAttention()
    shape = AttentionShape(0, 4, 2, 16, 0.25, window)
    lengths, tables = (600, 30), torch.tensor([[4, 1, 3], [0, 0, 0]], dtype=torch.int32)
    cos, sin = torch.rand(600, 16), torch.rand(600, 16)
    qkv = [torch.randn(length, 8 * 16) for length in lengths]
    outs = []
    for candidate in (backend, oracle):
        pool = PagePool(KVLayout(1, 2, 16, PAGE_SIZE, "float32", candidate.kv_order), 5)
        for spans in STEPS:
            positions = torch.cat([torch.arange(start, start + num) for start, num in spans])
            owner = torch.repeat_interleave(torch.arange(2), torch.tensor([num for _, num in spans]))
            kv_lens = torch.tensor([start + num for start, num in spans], dtype=torch.int32)
            batch = PackedBatch(
                input_ids_T=positions,
                positions_T=positions,
                slots_T=tables[owner, positions // PAGE_SIZE].long() * PAGE_SIZE + positions % PAGE_SIZE,
                cu_seqlens_B1=torch.tensor([0, spans[0][1], spans[0][1] + spans[1][1]], dtype=torch.int32),
                kv_lens_B=kv_lens,
                block_tables_BP=tables,
                logit_rows_R=positions[:0],
                max_q_len=max(num for _, num in spans),
                max_kv_len=int(kv_lens.max()),
                pool=pool,
                num_decode=sum(num == 1 for _, num in spans),
                cos_TD=cos[positions],
                sin_TD=sin[positions],
            )
            rows = torch.cat([x[start : start + num] for x, (start, num) in zip(qkv, spans, strict=True)])
            outs.append(candidate.forward(rows, None, shape, batch).clone())
    for got, want in zip(outs[: len(STEPS)], outs[len(STEPS) :], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("documented_kernels")
@pytest.mark.parametrize("name", ["flash_attn", "torch_flash"])
@pytest.mark.parametrize(
    ("borders", "first", "last"),
    [
        ([0, 1, 2, 3, 4], [0, 0, 5, 0], [700, 3, 5, 0]),  # decode; two rows see nothing
        ([0, 1, 2, 3, 4], [0, 9, 0, 0], [700, 300, 5, 1]),  # not from the first key on
        ([0, 0, 2, 3, 4], [0, 0, 0, 0], [700, 3, 5, 0]),  # as many segments as rows
        ([0, 4], [0, 0, 0, 0], [700, 3, 5, 0]),
    ],
)
@pytest.mark.parametrize("heads", [(0, 3), (1, 2)])
def test_ranges_mean_the_same_as_in_torch(name, borders, first, last, heads):
    torch.manual_seed(1)
    backend, oracle = ATTENTION.get(name)(), TorchPagedAttention()
    pool = PagePool(KVLayout(1, 3, 16, PAGE_SIZE, "float32", backend.kv_order), 5)
    for pages in pool.views(0):
        pages.normal_()
    num_heads = 2 * (heads[1] - heads[0])
    q, shape = torch.randn(4, num_heads, 16), AttentionShape(0, num_heads, num_heads // 2, 16, 0.25, window=7)
    tables = torch.tensor([4, 1, 3], dtype=torch.int32).expand(len(borders) - 1, 3)
    borders, first, last = (torch.tensor(x, dtype=torch.int32) for x in (borders, first, last))
    ranges = KeyRanges(borders, tables, first, last)
    got = backend.attend_ranges(q, shape, ranges, pool, first_kv_head=heads[0])
    want = oracle.attend_ranges(q, shape, ranges, pool, first_kv_head=heads[0])
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("documented_kernels")
def test_decode_over_ranges_goes_to_the_kernel(monkeypatch):
    backend = ATTENTION.get("flash_attn")()
    monkeypatch.setattr("longctx.attention.backend.attend_key_ranges", None)
    pool = PagePool(KVLayout(1, 1, 16, PAGE_SIZE, "float32", "nhd"), 2)
    index = torch.tensor([0, 1, 2], dtype=torch.int32)
    ranges = KeyRanges(index, torch.zeros(2, 1, dtype=torch.int32), torch.zeros_like(index[:2]), index[1:])
    out, lse = backend.attend_ranges(torch.randn(2, 2, 16), AttentionShape(0, 2, 1, 16, 0.25), ranges, pool)
    assert out.shape == (2, 2, 16) and torch.equal(lse, index[1:, None].expand(2, 2).log())


@pytest.mark.parametrize(
    ("name", "device", "dtype", "dim", "reason"),
    [
        ("torch_flash", "cpu", torch.bfloat16, 64, "not on cpu"),
        ("torch_flash", "cuda", torch.float32, 64, "float32"),
        ("torch_flash", "cuda", torch.bfloat16, 260, "260"),
    ],
)
def test_flash_says_why_it_cannot_run(name, device, dtype, dim, reason):
    assert reason in ATTENTION.get(name).unsupported(torch.device(device), dtype, dim)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flash_attn", "torch_flash", "triton"])
def test_kernels_equal_the_reference_on_a_gpu(name):
    device, dtype = torch.device("cuda"), torch.bfloat16
    backend_class = ATTENTION.get(name)
    if reason := backend_class.unsupported(device, dtype, 64):
        pytest.skip(reason)
    torch.manual_seed(0)
    shape = AttentionShape(0, 8, 2, 64, 0.125, None)
    qkv = torch.randn(700, 12 * 64, device=device, dtype=dtype)
    outs = []
    for candidate in (backend_class(), TorchPagedAttention()):
        pool = PagePool(KVLayout(1, 2, 64, PAGE_SIZE, "bfloat16", candidate.kv_order), 4, device=device)
        positions = torch.arange(700, device=device)
        table = torch.tensor([[2, 0, 3]], dtype=torch.int32, device=device)
        batch = PackedBatch(
            input_ids_T=positions,
            positions_T=positions,
            slots_T=table[0, positions // PAGE_SIZE].long() * PAGE_SIZE + positions % PAGE_SIZE,
            cu_seqlens_B1=torch.tensor([0, 700], dtype=torch.int32, device=device),
            kv_lens_B=torch.tensor([700], dtype=torch.int32, device=device),
            block_tables_BP=table,
            logit_rows_R=positions[:0],
            max_q_len=700,
            max_kv_len=700,
            pool=pool,
            cos_TD=torch.ones(700, 64, device=device),
            sin_TD=torch.zeros(700, 64, device=device),
        )
        outs.append(candidate.forward(qkv, None, shape, batch).float())
    assert (outs[0] - outs[1]).abs().max() < 3e-2
