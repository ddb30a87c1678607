"""The GPU flash kernels' documented meaning, straight from the formula in float64, to stand in for them on a CPU.

Masks are aligned to the bottom right corner; a bound of as many keys as there are is none. The backward takes of O only
rowsum(dO * O), as the kernels do.
"""

import torch

ALIGNMENT = 16


def attend(q, k, v, *, scale, causal, window):
    """Output in q's dtype, log-sum-exp ``[B, H, S]``."""
    for x in (q, k, v):
        _check_readable(x)
    scores, v = _scores(q, k, scale, causal, window), _expand(v, q)
    lse = scores.logsumexp(-1)
    assert torch.isfinite(lse).all(), "a row sees nothing"
    out = torch.einsum("bhij,bjhd->bihd", torch.exp(scores - lse[..., None]), v)
    return out.to(q.dtype), lse.to(torch.float64 if q.dtype == torch.float64 else torch.float32)


def differentiate(dout, q, k, v, out, lse, *, scale, causal, window):
    """dQ, dK, dV in q's dtype."""
    for x in (dout, q, k, v, out):
        _check_readable(x)
    assert lse.is_contiguous() and lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    assert out.dtype == dout.dtype == q.dtype and out.shape == q.shape
    weights = torch.exp(_scores(q, k, scale, causal, window) - lse.double()[..., None])
    dout, delta = dout.double(), (dout.double() * out.double()).sum(-1).transpose(1, 2)
    dv = torch.einsum("bhij,bihd->bjhd", weights, dout)
    dscores = weights * (torch.einsum("bihd,bjhd->bhij", dout, _expand(v, q)) - delta[..., None]) * scale
    dq = torch.einsum("bhij,bjhd->bihd", dscores, _expand(k, q))
    dk = torch.einsum("bhij,bihd->bjhd", dscores, q.double())
    dk, dv = (x.unflatten(2, (k.shape[2], -1)).sum(3) for x in (dk, dv))
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def _scores(q, k, scale, causal, window):
    left, right = window
    assert not causal or right in (-1, 0)
    right = 0 if causal else right
    num_q, num_kv = q.shape[1], k.shape[1]
    left, right = (-1 if bound >= num_kv else bound for bound in (left, right))
    i, j = torch.arange(num_q)[:, None] + num_kv - num_q, torch.arange(num_kv)[None]
    hidden = torch.zeros(num_q, num_kv, dtype=torch.bool)
    if left >= 0:
        hidden |= j < i - left
    if right >= 0:
        hidden |= j > i + right
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), _expand(k, q)) * scale
    return scores.masked_fill(hidden, float("-inf"))


def _expand(x, q):
    return x.double().repeat_interleave(q.shape[2] // x.shape[2], 2)


def _check_readable(x):
    assert x.stride(-1) == 1 and x.data_ptr() % ALIGNMENT == 0
