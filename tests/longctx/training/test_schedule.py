"""Learning rates over the steps."""

import pytest

from longctx.training.config import OptimizerConfig
from longctx.training.schedule import learning_rate


def rates(num_steps: int = 11, **options) -> list[float]:
    config = OptimizerConfig(lr=1.0, **options)
    return [learning_rate(config, step, num_steps) for step in range(num_steps)]


def test_warm_up_rises_to_the_top():
    assert rates(schedule="constant", warmup_steps=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_linear_and_cosine_fall_to_the_least():
    assert rates(schedule="linear", min_lr_ratio=0.5, num_steps=10)[::5] == [1.0, 0.75]
    cosine = rates(schedule="cosine", min_lr_ratio=0.0, num_steps=10)
    assert cosine[0] == 1.0
    assert cosine[5] == pytest.approx(0.5)
    assert sorted(cosine, reverse=True) == cosine


def test_wsd_is_stable_and_then_falls():
    wsd = rates(schedule="wsd", decay_share=0.5, min_lr_ratio=0.0, num_steps=10, warmup_steps=0)
    assert wsd[:6] == [1.0] * 6
    assert wsd[6:] == pytest.approx([0.8, 0.6, 0.4, 0.2])
