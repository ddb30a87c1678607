"""What landmark attention computes at inference, one query after another, from landmark_retrieval.py's formulas."""

import torch


def infer(q, k, v, landmarks, *, block_size, top_k, rotate, scale):
    """Output ``[S, H, D]`` of text tokens and ``[N, H, D]`` of landmarks; float64.

    Args:
        q, k, v: ``[S, heads, D]`` of text tokens before RoPE.
        landmarks: ``(q, k)`` of the landmarks of whole blocks, ``[N, heads, D]`` before RoPE.
        rotate: of ``(x [n, D], positions [n])``.
    """
    group = q.shape[1] // k.shape[1]
    landmark_q, landmark_k = landmarks
    rows = [(q[i], i // block_size, i % block_size, i % block_size + 1) for i in range(len(q))]
    rows += [(landmark_q[n], n, block_size, block_size) for n in range(len(landmark_q))]
    out = torch.empty(len(rows), *q.shape[1:], dtype=torch.float64)
    for head in range(q.shape[1]):
        keys, values, its_landmarks = (x[:, head // group] for x in (k, v, landmark_k))
        for i, (query, *row) in enumerate(rows):
            out[i, head] = _one(query[head], keys, values, its_landmarks, *row, block_size, top_k, rotate, scale)
    return out[: len(q)], out[len(q) :]


def _one(query, k, v, landmark_k, block, offset, num_own, block_size, top_k, rotate, scale):
    size = block_size + 1
    turned = rotate(query[None], torch.tensor([(top_k + 1) * size + offset]))[0]

    def score(keys, slots, places):
        return rotate(keys, torch.as_tensor(slots) * size + torch.as_tensor(places)) @ turned * scale

    recent = range(max(0, block - top_k), block)
    slots = [earlier - block + top_k + 1 if earlier in recent else 0 for earlier in range(block)]
    scored = (score(landmark_k[:block], slots, block_size) / scale * 1024).round().tolist()
    chosen = sorted(earlier for _, earlier in sorted(zip(scored, range(block), strict=True), reverse=True)[:top_k])
    slots = [rank + top_k - len(chosen) + (earlier in recent) for rank, earlier in enumerate(chosen)]
    own = slice(block * block_size, block * block_size + num_own)
    gates = score(landmark_k[chosen], slots, block_size)
    weights = torch.cat((score(k[own], top_k + 1, torch.arange(num_own)), gates)).softmax(0)
    out = weights[:num_own] @ v[own]
    for gate, earlier, slot in zip(weights[num_own:], chosen, slots, strict=True):
        tokens = slice(earlier * block_size, (earlier + 1) * block_size)
        out = out + gate * (score(k[tokens], slot, torch.arange(block_size)).softmax(0) @ v[tokens])
    return out
