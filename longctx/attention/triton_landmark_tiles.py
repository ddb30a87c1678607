"""A tile of landmark attention in Triton: what its forward and its two backward kernels have in common.

Legend: see ``longctx/attention/triton_landmark.py``.
"""

import triton
import triton.language as tl


@triton.jit
def _sum(x_RC, ROWS: tl.constexpr, SLOTS: tl.constexpr, BLOCKS: tl.constexpr):
    """Over the slots of each block: ``[R, M]``."""
    if BLOCKS == 1:
        sum_RM = tl.sum(x_RC, 1)[:, None]
    else:
        sum_RM = tl.sum(tl.reshape(x_RC, (ROWS, BLOCKS, SLOTS)), 2)
    return sum_RM  # the only return: under a compiler all of a function's are to be of one shape


@triton.jit
def _max(x_RC, ROWS: tl.constexpr, SLOTS: tl.constexpr, BLOCKS: tl.constexpr):
    if BLOCKS == 1:
        largest_RM = tl.max(x_RC, 1)[:, None]
    else:
        largest_RM = tl.max(tl.reshape(x_RC, (ROWS, BLOCKS, SLOTS)), 2)
    return largest_RM


@triton.jit
def spread(x_RM, ROWS: tl.constexpr, SLOTS: tl.constexpr, BLOCKS: tl.constexpr):
    """A block's number for each of its slots, to be used with ``[R, C]``."""
    if BLOCKS == 1:
        x_RC = x_RM
    else:
        x_RC = tl.reshape(tl.broadcast_to(x_RM[:, :, None], (ROWS, BLOCKS, SLOTS)), (ROWS, BLOCKS * SLOTS))
    return x_RC


@triton.jit
def score_tile(
    q_RD, k_CD, length_ptr, begin, num_blocks, factor,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile's scores in base 2; those of its landmarks ``[R, M]``; exponentials of each block's own softmax, not
    divided yet, ``[R, C]``, and their sums ``[R, M]``."""
    slot_C, block_C = tl.arange(0, BLOCKS * SLOTS) % SLOTS, begin + tl.arange(0, BLOCKS * SLOTS) // SLOTS
    length_C = tl.load(length_ptr + block_C, mask=block_C < num_blocks, other=0)
    scores_RC = tl.dot(q_RD, tl.trans(k_CD), input_precision=PRECISION) * factor
    landmark_RM = _sum(tl.where((slot_C == SLOTS - 1)[None, :], scores_RC, 0.0), ROWS, SLOTS, BLOCKS)
    inner_RC = tl.where((slot_C < length_C)[None, :], scores_RC, float("-inf"))
    largest_RM = _max(inner_RC, ROWS, SLOTS, BLOCKS)
    largest_RM = tl.where(largest_RM == float("-inf"), 0.0, largest_RM)
    inner_RC = tl.exp2(inner_RC - spread(largest_RM, ROWS, SLOTS, BLOCKS))
    return scores_RC, landmark_RM, inner_RC, tl.maximum(_sum(inner_RC, ROWS, SLOTS, BLOCKS), 1e-30)


@triton.jit
def own_scores(scores_RC, begin, block_R, seen_R, SLOTS: tl.constexpr, BLOCKS: tl.constexpr):
    """The scores of what queries see of their own blocks, minus infinity elsewhere."""
    slot_C, block_C = tl.arange(0, BLOCKS * SLOTS) % SLOTS, begin + tl.arange(0, BLOCKS * SLOTS) // SLOTS
    is_seen_RC = (block_C[None, :] == block_R[:, None]) & (slot_C[None, :] < seen_R[:, None])
    return tl.where(is_seen_RC, scores_RC, float("-inf"))


@triton.jit
def differentiate_tile(
    q_RD, k_CD, v_CD, dout_RD, lse_R, delta_R, length_ptr, begin, num_blocks, block_R, first_R, seen_R, factor,
    HAS_OWN: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile's weights and the gradients of its scores, both ``[R, C]``."""
    scores_RC, landmark_RM, inner_RC, sum_RM = score_tile(
        q_RD, k_CD, length_ptr, begin, num_blocks, factor, ROWS, SLOTS, BLOCKS, PRECISION
    )
    at_M = begin + tl.arange(0, BLOCKS)
    is_earlier_RM = (at_M[None, :] < block_R[:, None]) & (at_M[None, :] >= first_R[:, None])
    gate_RM = tl.where(is_earlier_RM, tl.exp2(landmark_RM - lse_R[:, None]), 0.0)
    dweights_RC = tl.dot(dout_RD, tl.trans(v_CD), input_precision=PRECISION)
    mean_RM = _sum(inner_RC * dweights_RC, ROWS, SLOTS, BLOCKS) / sum_RM
    weights_RC = inner_RC * spread(gate_RM / sum_RM, ROWS, SLOTS, BLOCKS)
    dscores_RC = weights_RC * (dweights_RC - spread(mean_RM, ROWS, SLOTS, BLOCKS))
    is_landmark_C = tl.arange(0, BLOCKS * SLOTS) % SLOTS == SLOTS - 1
    dlandmark_RC = spread(gate_RM * (mean_RM - delta_R[:, None]), ROWS, SLOTS, BLOCKS)
    dscores_RC = tl.where(is_landmark_C[None, :], dlandmark_RC, dscores_RC)
    if HAS_OWN:
        own_RC = tl.exp2(own_scores(scores_RC, begin, block_R, seen_R, SLOTS, BLOCKS) - lse_R[:, None])
        weights_RC += own_RC
        dscores_RC += own_RC * (dweights_RC - delta_R[:, None])
    return weights_RC, dscores_RC
