"""Every attention implementation against an fp64 reference written from the formula.

Longer than other files: causal calls and ranged ones share the pools, shapes and tolerances.
"""

import math

import pytest
import torch

from longctx.attention.backend import HeadNorm
from longctx.attention.batch import AttentionShape, KeyRanges, PackedBatch
from longctx.attention.registry import ATTENTION, choose_attention
from memory.layout import KVLayout
from memory.page_rows import write_rows
from memory.pages import PagePool
from parallel.merge import merge_partial_

CPU = torch.device("cpu")
NAMES = ("native", "torch")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def make_backend(name, dtype, head_dim):
    backend = ATTENTION.get(name)
    reason = backend.unsupported(CPU, dtype, head_dim)
    if reason:
        pytest.skip(reason)
    return backend()


def make_pool(backend, *, num_kv_heads, head_dim, page_size, dtype, num_pages, num_layers=2):
    name = str(dtype).removeprefix("torch.")
    layout = KVLayout(num_layers, num_kv_heads, head_dim, page_size, name, backend.kv_order)
    pool = PagePool(layout, num_pages)
    pool.storage.random_(0, 60)  # whatever lay in a page before must not matter
    return pool


def make_batch(pool, segments, tables, *, cos, sin):
    """``segments``: (first position, number of tokens) of each sequence in this step."""
    size = pool.layout.page_size
    positions = torch.cat([torch.arange(first, first + count) for first, count in segments])
    owner = torch.cat([torch.full((count,), i) for i, (_, count) in enumerate(segments)])
    borders = torch.tensor([0, *torch.tensor([count for _, count in segments]).cumsum(0).tolist()], dtype=torch.int32)
    kv_lens = torch.tensor([first + count for first, count in segments], dtype=torch.int32)
    pages = tables[owner, positions // size].long()
    return PackedBatch(
        input_ids_T=positions,
        positions_T=positions,
        slots_T=pages * size + positions % size,
        cu_seqlens_B1=borders,
        kv_lens_B=kv_lens,
        block_tables_BP=tables,
        logit_rows_R=positions[:0],
        max_q_len=max(count for _, count in segments),
        max_kv_len=int(kv_lens.max()),
        pool=pool,
        cos_TD=cos[positions],
        sin_TD=sin[positions],
    )


def reference(q_SHD, k_SKD, v_SKD, *, scale, window):
    """softmax(q k^T scale + mask) v in float64, one sequence."""
    group = q_SHD.shape[1] // k_SKD.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k_SKD, v_SKD))
    scores = torch.einsum("qhd,khd->hqk", q_SHD.double(), k) * scale
    query, key = torch.arange(q_SHD.shape[0])[:, None], torch.arange(k.shape[0])[None]
    seen = (key <= query) if window is None else (key <= query) & (query - key < window)
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


def rotate_reference(x_SHD, cos, sin):
    dim = cos.shape[-1]
    x = x_SHD.double()
    low, high = x[..., : dim // 2], x[..., dim // 2 : dim]
    c, s = cos.double()[:, None], sin.double()[:, None]
    return torch.cat(
        (
            low * c[..., : dim // 2] - high * s[..., : dim // 2],
            high * c[..., dim // 2 :] + low * s[..., dim // 2 :],
            x[..., dim:],
        ),
        -1,
    )


def normalise_reference(x, weight, eps):
    x = x.double()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight.double()


SHAPES = [
    # heads, KV heads, head dim, page size, window, rotary dim, head norm
    (12, 4, 64, 64, None, 64, False),
    (4, 1, 128, 64, None, 128, True),
    (8, 8, 32, 16, None, 32, False),
    (4, 2, 96, 32, 40, 48, False),
    (2, 2, 16, 16, 7, 16, True),
    (14, 2, 80, 48, 130, 80, False),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads,kv_heads,dim,page_size,window,rotary_dim,with_norm", SHAPES)
def test_chunks_and_decode_equal_the_formula(
    name, dtype, heads, kv_heads, dim, page_size, window, rotary_dim, with_norm
):
    torch.manual_seed(1)
    backend = make_backend(name, dtype, dim)
    lengths = (150, 1, 73, 2)
    max_pages = -(-max(lengths) // page_size)
    pool = make_pool(
        backend, num_kv_heads=kv_heads, head_dim=dim, page_size=page_size, dtype=dtype, num_pages=4 * max_pages + 3
    )
    tables = torch.randperm(4 * max_pages + 3)[: 4 * max_pages].view(4, max_pages).int()
    angles = torch.arange(200)[:, None] * 0.7 ** torch.arange(rotary_dim // 2)[None]
    cos, sin = (f(torch.cat((angles, angles), 1)).float() for f in (torch.cos, torch.sin))
    shape = AttentionShape(1, heads, kv_heads, dim, dim**-0.5, window)
    norm = HeadNorm(torch.rand(dim) + 0.5, torch.rand(dim) + 0.5, 1e-6) if with_norm else None
    qkv = [torch.randn(length, (heads + 2 * kv_heads) * dim).to(dtype) for length in lengths]
    got = [torch.empty(length, heads * dim) for length in lengths]
    for step in range(40):
        # the first chunk takes all but 40 tokens (or nothing), then one token at a time; some sequences join late
        segments, members = [], []
        for i, length in enumerate(lengths):
            bulk = max(0, length - 39)
            first, count = (0, bulk) if step == 0 else (bulk + step - 1, 1)
            if count and first + count <= length:
                segments.append((first, count))
                members.append(i)
        if not segments:
            continue
        batch = make_batch(pool, segments, tables[members].contiguous(), cos=cos, sin=sin)
        rows = torch.cat([qkv[i][first : first + count] for i, (first, count) in zip(members, segments, strict=True)])
        out = backend.forward(rows, norm, shape, batch).float().clone()
        for i, (first, count), part in zip(members, segments, out.split([c for _, c in segments]), strict=True):
            got[i][first : first + count] = part
    for i, length in enumerate(lengths):
        q, k, v = qkv[i].double().view(length, -1, dim).split([heads, kv_heads, kv_heads], 1)
        if norm:
            q, k = normalise_reference(q, norm.q_weight, 1e-6), normalise_reference(k, norm.k_weight, 1e-6)
        q, k = rotate_reference(q, cos[:length], sin[:length]), rotate_reference(k, cos[:length], sin[:length])
        want = reference(q, k, v, scale=shape.scale, window=window)
        assert (got[i].double() - want).abs().max() < TOLERANCE[dtype], f"sequence {i}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 2500])
def test_native_splits_long_decodes(dtype, window):
    torch.manual_seed(2)
    backend = make_backend("native", dtype, 32)
    reference_backend = make_backend("torch", dtype, 32)
    length, page_size = 5000, 64
    cos, sin = torch.ones(length, 32), torch.zeros(length, 32)
    shape = AttentionShape(0, 4, 1, 32, 0.3, window)
    num_pages = -(-length // page_size)
    qkv = torch.randn(length, 6 * 32).to(dtype)
    outs = []
    for candidate in (backend, reference_backend):
        pool = make_pool(
            candidate, num_kv_heads=1, head_dim=32, page_size=page_size, dtype=dtype, num_pages=num_pages, num_layers=1
        )
        tables = torch.arange(num_pages, dtype=torch.int32)[None]
        chunk = make_batch(pool, [(0, length - 1)], tables, cos=cos, sin=sin)
        first = candidate.forward(qkv[:-1], None, shape, chunk).float().clone()
        last = candidate.forward(qkv[-1:], None, shape, make_batch(pool, [(length - 1, 1)], tables, cos=cos, sin=sin))
        outs.append(torch.cat((first, last.float())))
    assert (outs[0] - outs[1]).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_row_does_not_depend_on_company(dtype):
    torch.manual_seed(3)
    backend = make_backend("native", dtype, 64)
    pool = make_pool(backend, num_kv_heads=2, head_dim=64, page_size=16, dtype=dtype, num_pages=64, num_layers=1)
    cos, sin = torch.rand(300, 64), torch.rand(300, 64)
    shape = AttentionShape(0, 6, 2, 64, 0.125, None)
    tables = torch.randperm(64)[:60].view(3, 20).int()
    qkv = torch.randn(3, 300, 10 * 64).to(dtype)
    alone = backend.forward(
        qkv[1, :200], None, shape, make_batch(pool, [(0, 200)], tables[1:2], cos=cos, sin=sin)
    ).clone()
    segments = [(0, 17), (0, 200), (0, 5)]
    rows = torch.cat([qkv[i, :count] for i, (_, count) in enumerate(segments)])
    together = backend.forward(rows, None, shape, make_batch(pool, segments, tables, cos=cos, sin=sin))
    assert torch.equal(alone, together[17:217])
    chunked = [
        backend.forward(
            qkv[1, first : first + 50], None, shape, make_batch(pool, [(first, 50)], tables[1:2], cos=cos, sin=sin)
        ).clone()
        for first in range(0, 200, 50)
    ]
    assert torch.equal(alone, torch.cat(chunked))


def fill_pages(pool, tables, lengths):
    """Random KV for each sequence in layer 1, in float64 as the pages hold it."""
    layout, kvs = pool.layout, []
    for table, length in zip(tables, lengths, strict=True):
        token = torch.arange(length)
        slots = table[token // layout.page_size].long() * layout.page_size + token % layout.page_size
        kv = torch.randn(2, length, layout.num_kv_heads, layout.head_dim).to(pool.views(1)[0].dtype)
        write_rows(pool, 1, slots, kv[0], kv[1])
        kvs.append(kv.double())
    return kvs


def ranges_reference(q_SHD, k_LKD, v_LKD, first_S, last_S, *, scale):
    """Softmax over the keys of each row's range and its log-sum-exp, float64, one segment."""
    group, key = q_SHD.shape[1] // k_LKD.shape[1], torch.arange(k_LKD.shape[0])
    k, v = (x.repeat_interleave(group, 1) for x in (k_LKD, v_LKD))
    scores = torch.einsum("qhd,khd->qhk", q_SHD.double(), k) * scale
    seen = (key >= first_S[:, None]) & (key < last_S[:, None])
    scores = scores.masked_fill(~seen[:, None], -math.inf)
    out = torch.einsum("qhk,khd->qhd", scores.softmax(-1), v)
    return out.masked_fill(~seen.any(1)[:, None, None], 0.0), scores.logsumexp(-1)


def random_ranges(num_rows, num_keys):
    """Ranges of any length; every fourth row sees nothing, written in different ways."""
    first, last = torch.randint(0, num_keys + 1, (2, num_rows)).sort(0).values.int()
    if num_rows > 1:
        last[::4] = (first[::4] - torch.arange(len(first[::4])) % 3).clamp_min(0)
    return first, last


RANGE_SHAPES = [
    # heads, KV heads, head dim, page size, KV heads attended
    (12, 4, 64, 64, (0, 4)),
    (12, 4, 64, 16, (1, 3)),
    (8, 8, 32, 16, (5, 8)),
    (4, 1, 128, 64, (0, 1)),
    (4, 2, 96, 32, (1, 2)),
    (14, 2, 80, 48, (0, 2)),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads,kv_heads,dim,page_size,attended", RANGE_SHAPES)
def test_ranges_equal_the_formula(name, dtype, heads, kv_heads, dim, page_size, attended):
    torch.manual_seed(5)
    backend = make_backend(name, dtype, dim)
    lengths, num_rows = (700, 5000, 130, 2100, 33), (50, 1, 0, 1, 33)
    widths = [-(-length // page_size) for length in lengths]
    pool = make_pool(
        backend, num_kv_heads=kv_heads, head_dim=dim, page_size=page_size, dtype=dtype, num_pages=sum(widths)
    )
    tables = torch.zeros(len(lengths), max(widths), dtype=torch.int32)
    for table, pages in zip(tables, torch.randperm(sum(widths)).split(widths), strict=True):
        table[: len(pages)] = pages
    kvs = fill_pages(pool, tables, lengths)
    parts = [random_ranges(rows, keys) for rows, keys in zip(num_rows, lengths, strict=True)]
    parts[1] = torch.tensor([[100], [4990]], dtype=torch.int32)  # parts of three splits
    window = torch.arange(33, dtype=torch.int32)
    parts[4] = ((window - 6).clamp_min(0), window + 1)
    group, (low, high) = heads // kv_heads, attended
    q = torch.randn(sum(num_rows), heads, dim).to(dtype)[:, low * group : high * group]
    shape = AttentionShape(1, (high - low) * group, high - low, dim, dim**-0.5, window=3)
    borders = torch.tensor([0, *torch.tensor(num_rows).cumsum(0)], dtype=torch.int32)
    ranges = KeyRanges(borders, tables, torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]))
    out, lse = backend.attend_ranges(q, shape, ranges, pool, first_kv_head=low)
    assert out.dtype == lse.dtype == torch.float32 and out.shape == q.shape and lse.shape == q.shape[:2]
    rows = q.split(num_rows), out.split(num_rows), lse.split(num_rows), parts, kvs
    for q_SHD, got_out, got_lse, (first, last), kv in zip(*rows, strict=True):
        k, v = kv[:, :, low:high]
        want_out, want_lse = ranges_reference(q_SHD, k, v, first, last, scale=shape.scale)
        torch.testing.assert_close(got_out.double(), want_out, rtol=0, atol=TOLERANCE[dtype])
        torch.testing.assert_close(got_lse.double(), want_lse, rtol=0, atol=TOLERANCE[dtype])
        assert not got_out[first >= last].any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows_per_segment", [1, 10])
@pytest.mark.parametrize("page_size", [16, 64])
def test_parts_of_the_keys_merge_to_the_whole(name, rows_per_segment, page_size):
    torch.manual_seed(6)
    backend = make_backend(name, torch.float32, 32)
    num_keys, num_rows, num_parts = 4500, 20, 3
    num_pages = -(-num_keys // page_size)
    pool = make_pool(
        backend, num_kv_heads=2, head_dim=32, page_size=page_size, dtype=torch.float32, num_pages=num_pages
    )
    table = torch.randperm(num_pages).int()
    fill_pages(pool, table[None], [num_keys])
    q, shape = torch.randn(num_rows, 6, 32), AttentionShape(1, 6, 2, 32, 0.3)
    first, last = random_ranges(num_rows, num_keys)
    borders = torch.arange(0, num_rows + 1, rows_per_segment, dtype=torch.int32)

    def attend(pages, first, last):
        shared = table[pages].expand(len(borders) - 1, len(pages))  # one table in memory for every segment
        return backend.attend_ranges(q, shape, KeyRanges(borders, shared, first.int(), last.int()), pool)

    want_out, want_lse = attend(torch.arange(num_pages), first, last)
    out, lse = torch.zeros_like(want_out), torch.full_like(want_lse, -math.inf)
    owner_of_page = torch.randint(0, num_parts, (num_pages,))
    owner_of_key = owner_of_page.repeat_interleave(page_size)[:num_keys]
    for part in range(num_parts):
        keys_before = torch.cat((torch.zeros(1), (owner_of_key == part).cumsum(0)))
        part_out, part_lse = attend((owner_of_page == part).nonzero()[:, 0], keys_before[first], keys_before[last])
        seen = part_lse[:, 0] > -math.inf  # what merge_partial_ asks for
        merged_out, merged_lse = out[seen], lse[seen]
        merge_partial_(merged_out, merged_lse, part_out[seen], part_lse[seen])
        out[seen], lse[seen] = merged_out, merged_lse
    torch.testing.assert_close(out, want_out, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 50])
def test_prepared_queries_attend_by_range_as_forward_does(name, dtype, window):
    torch.manual_seed(7)
    backend, segments = make_backend(name, dtype, 32), [(100, 1), (0, 90), (17, 20)]
    pool = make_pool(backend, num_kv_heads=2, head_dim=32, page_size=16, dtype=dtype, num_pages=21)
    tables, shape = torch.randperm(21).view(3, 7).int(), AttentionShape(1, 6, 2, 32, 0.2, window)
    qkv = torch.randn(111, 10 * 32).to(dtype)
    batch = make_batch(pool, segments, tables, cos=torch.rand(128, 32), sin=torch.rand(128, 32))
    q = backend.prepare(qkv, None, shape, batch).clone()
    last = batch.positions_T.int() + 1
    first = torch.zeros_like(last) if window is None else (last - window).clamp_min(0)
    out, _ = backend.attend_ranges(q, shape, KeyRanges(batch.cu_seqlens_B1, tables, first, last), pool)
    want = backend.forward(qkv, None, shape, batch).float()
    torch.testing.assert_close(out.flatten(1), want, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 40])
def test_native_elementwise_steps_equal_torch(dtype, rows):
    torch.manual_seed(4)
    native, plain = make_backend("native", dtype, 64), make_backend("torch", dtype, 64)
    x, addend, weight = torch.randn(rows, 192).to(dtype), torch.randn(rows, 192).to(dtype), torch.rand(192)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    assert (native.rms_norm(x, weight, 1e-5).float() - plain.rms_norm(x, weight, 1e-5).float()).abs().max() < tolerance
    gate_up = (torch.randn(rows, 384) * 10).to(dtype)
    want = plain.silu_mul(gate_up.float())
    assert ((native.silu_mul(gate_up).float() - want).abs() / (1 + want.abs())).max() < tolerance
    first, second = x.clone(), x.clone()
    got, want = native.add_rms_norm(first, addend, weight, 1e-5), plain.add_rms_norm(second, addend, weight, 1e-5)
    assert torch.equal(first, second)
    assert (got.float() - want.float()).abs().max() < tolerance


@pytest.mark.parametrize(
    ("device", "dtype", "dim", "reason"),
    [("cuda", torch.float32, 64, "cuda"), ("cpu", torch.float16, 64, "float16"), ("cpu", torch.float32, 40, "40")],
)
def test_native_says_why_it_cannot_run(device, dtype, dim, reason):
    assert reason in ATTENTION.get("native").unsupported(torch.device(device), dtype, dim)


def test_too_many_query_heads_per_kv_head_are_not_for_the_native_kernels():
    make_backend("native", torch.float32, 16)
    assert choose_attention("auto", CPU, torch.float32, 16, group_size=96).name == "native"
    assert choose_attention("auto", CPU, torch.float32, 16, group_size=97).name == "torch"
    with pytest.raises(ValueError, match="97 query heads share a KV head; it takes at most 96"):
        choose_attention("native", CPU, torch.float32, 16, group_size=97)
