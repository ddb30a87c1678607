"""Landmark attention straight from its formulas, a query at a time, in the dtype that it is given (float64)."""

import itertools

import torch


def landmark_reference(q, k, v, is_landmark, scale, bounds):
    """``[batch, seq, heads, dim]``."""
    group = q.shape[2] // k.shape[2]
    out = []
    for row in range(q.shape[0]):
        for start, stop in itertools.pairwise(bounds):
            for i in range(start, stop):
                own = i
                while own > start and not bool(is_landmark[row, own - 1]):
                    own -= 1
                blocks, begin = [], start
                for j in range(start, own):
                    if bool(is_landmark[row, j]):
                        blocks.append((range(begin, j), j))
                        begin = j + 1
                local = [j for j in range(own, i + 1) if not bool(is_landmark[row, j])]
                heads = []
                for h in range(q.shape[2]):
                    keys, values = k[row, :, h // group], v[row, :, h // group]
                    joint = [*local, *(landmark for _, landmark in blocks)]
                    weights = (keys[joint] @ q[row, i, h] * scale).softmax(0)
                    value = weights[: len(local)] @ values[local]
                    for gate, (tokens, _) in zip(weights[len(local) :], blocks, strict=True):
                        inner = (keys[list(tokens)] @ q[row, i, h] * scale).softmax(0)
                        value = value + gate * (inner @ values[list(tokens)])
                    heads.append(value)
                out.append(torch.stack(heads))
    return torch.stack(out).unflatten(0, q.shape[:2])
