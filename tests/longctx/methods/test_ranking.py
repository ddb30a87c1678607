"""The native ranking is torch's, and both are what sorting says."""

import pytest
import torch

from longctx.attention.ranking import TIES, rank_scores, rank_with_torch


def rank_by_sorting(scores, top_k):
    rows = []
    for row in scores.reshape(-1, scores.shape[-1]):
        rounded = (row * TIES).round().tolist()
        order = sorted((-value, -idx) for idx, value in enumerate(rounded) if value > float("-inf"))
        best = sorted(-idx for _, idx in order[:top_k])
        rows.append([-1] * (top_k - len(best)) + best)
    return torch.tensor(rows).view(*scores.shape[:-1], top_k)


@pytest.mark.parametrize("rank", [rank_scores, rank_with_torch])
@pytest.mark.parametrize("num_scores", [1, 3, 31, 32, 33, 64, 257])
@pytest.mark.parametrize("top_k", [1, 4, 7])
def test_ranks(rank, num_scores, top_k):
    torch.manual_seed(num_scores)
    scores = torch.randn(3, 2, 5, num_scores)
    scores[0] = scores[0].mul(2).round() / 2  # ties
    scores[1, 0] = 0.25
    scores[1, 1, :3, num_scores // 2 :] = float("-inf")
    scores[2, 1, 2] = float("-inf")
    wanted = rank_by_sorting(scores, top_k)
    assert torch.equal(rank(scores, top_k), wanted)
    assert torch.equal(rank(scores.transpose(0, 2), top_k), wanted.transpose(0, 2))


def test_what_differs_by_less_than_a_fraction_is_a_tie():
    scores = torch.tensor([0.5 + 0.2 / TIES, 0.5, 0.1, 0.5 - 0.2 / TIES, 0.0])
    assert rank_scores(scores, 1).tolist() == [3]
