"""CCA attention straight from its formulas, a query at a time, in the dtype that it is given (float64)."""

import itertools

import torch


def cca_reference(
    q, k, v, *, group_size, window, scale, bounds, rope=None, core_position="last", head_pooling="weights", core_fetch=0
):
    """``[batch, seq, heads, dim]``; ``rope`` takes one vector and its position."""
    num_heads, num_kv_heads = q.shape[2], k.shape[2]
    members = num_heads // num_kv_heads
    turn = rope or (lambda x, _: x)
    out = []
    for row in range(q.shape[0]):
        for start, stop in itertools.pairwise(bounds):
            heads = [[] for _ in range(stop - start)]
            for h in range(num_heads):
                kv = h // members
                keys, values, queries = k[row, start:stop, kv], v[row, start:stop, kv], q[row, start:stop]
                cores = []
                for first in range(0, (stop - start) // group_size * group_size, group_size):
                    group = slice(first, first + group_size)
                    own = queries[first + group_size - 1, kv * members : (kv + 1) * members]
                    if head_pooling == "query":
                        own = own.mean(0, keepdim=True)
                    a = (own @ keys[group].T * scale).softmax(-1).mean(0)
                    places = torch.arange(first, first + group_size, dtype=q.dtype)
                    place = {"last": places[-1], "middle": places.mean(), "mean": (a.detach() * places).sum()}
                    cores.append((turn(a @ keys[group], place[core_position]), a @ values[group]))
                for i in range(stop - start):
                    num_cores = max(0, (i + 1 - window) // group_size)
                    query = turn(queries[i, h], i)
                    rotated = [turn(keys[j], j) for j in range(num_cores * group_size)] if core_fetch else []
                    fetched = _best_groups(rotated, group_size, query * scale, core_fetch)
                    pooled = [core for idx, core in enumerate(cores[:num_cores]) if idx not in fetched]
                    raw = [idx * group_size + offset for idx in fetched for offset in range(group_size)]
                    raw += range(num_cores * group_size, i + 1)
                    seen = [core for core, _ in pooled] + [turn(keys[j], j) for j in raw]
                    held = [value for _, value in pooled] + [values[j] for j in raw]
                    weights = (torch.stack(seen) @ query * scale).softmax(0)
                    heads[i].append(weights @ torch.stack(held))
            out += [torch.stack(each) for each in heads]
    return torch.stack(out).unflatten(0, q.shape[:2])


def _best_groups(keys, group_size, query, count):
    """Numbers of the groups with the highest bound on a score, the newest of those that are equal to 1/1024."""
    scores = []
    for first in range(0, len(keys), group_size):
        by_dim = torch.stack(keys[first : first + group_size]) * query
        scores.append(round(float(by_dim.amax(0).sum()) * 1024))  # the greatest product of each dimension
    return sorted(range(len(scores)), key=lambda idx: (scores[idx], idx), reverse=True)[:count]
