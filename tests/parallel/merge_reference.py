"""Merging partial attention straight from its meaning, in float64, and cases with every kind of row."""

import torch


def merge_reference(out, lse, partial_out, partial_lse):
    """Attention over both sets of keys: sums of exponentials, each output weighted by its own."""
    lse, partial_lse = lse.double(), partial_lse.double()
    both = torch.stack([lse, partial_lse])
    total = both.logsumexp(0)
    weights = torch.exp(both - total).nan_to_num(0)
    old, new = (
        torch.where(w[..., None] > 0, x.double() * w[..., None], 0)
        for w, x in zip(weights, (out, partial_out), strict=True)
    )
    return old + new, total


def make_case(shape, dtype, partial_dtype, layout, device="cpu"):
    """Rows seen by both, by one and by none; far apart, and large enough that exp alone would overflow."""
    generator = torch.Generator().manual_seed(sum(shape))
    out, partial_out = (_place(torch.randn(shape, generator=generator), layout) for _ in range(2))
    lse, partial_lse = (_place(torch.randn(shape[:3], generator=generator) * 300, layout) for _ in range(2))
    kind = torch.randint(6, shape[:3], generator=generator)
    near = kind >= 3
    partial_lse[near] = lse[near] + partial_lse[near] / 300
    lse[(kind == 0) | (kind == 2)] = float("-inf")
    partial_lse[(kind == 1) | (kind == 2)] = float("-inf")
    out[torch.isinf(lse)] = 0
    partial_out[torch.isinf(partial_lse)] = float("nan")  # is not to be read
    case = (out.to(dtype), lse.to(dtype), partial_out.to(partial_dtype), partial_lse.to(dtype))
    return tuple(_place(x.to(device), layout) for x in case)


def _place(x, layout):
    """The same values as a view: of some rows and heads of a larger tensor, or of one with heads before tokens."""
    if layout == "whole":
        return x
    if layout == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    batch_size, num_tokens, num_heads, *rest = x.shape
    larger = x.new_full((batch_size, num_tokens + 3, num_heads + 2, *rest), 7.0)
    view = larger[:, 2 : 2 + num_tokens, 1 : 1 + num_heads]
    view.copy_(x)
    return view
