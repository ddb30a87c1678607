"""Every attention implementation against an fp64 reference written from the formula."""

import math

import pytest
import torch

from longctx.attention.backend import HeadNorm
from longctx.attention.batch import AttentionShape, PackedBatch
from longctx.attention.registry import ATTENTION
from memory.layout import KVLayout
from memory.pages import PagePool

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
