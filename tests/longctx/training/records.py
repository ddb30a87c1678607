"""Records of steps for tests of logs and reports."""

from longctx.training.record import StepRecord


def make_record(step: int, **changed) -> StepRecord:
    """A step of 10 with round numbers."""
    values = {
        "num_steps": 10,
        "loss": 4.0 - step / 10,
        "num_tokens": 1000,
        "num_trained_tokens": 900,
        "seconds": 0.5,
        "grad_norm": 1.25,
        "lr": 3e-4,
        "memory_bytes": (2**30, 3 * 2**29),
        "flops_share": 0.375,
    }
    return StepRecord(step=step, **values | changed)
