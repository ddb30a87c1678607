"""What one optimizer step did, as every log and the report show it. No torch here."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step over all ranks."""

    step: int  # optimizer steps done, this one included
    num_steps: int  # of the run
    loss: float  # mean over the trained tokens
    num_tokens: int  # of the step's sequences
    num_trained_tokens: int  # those of them that the loss counts
    seconds: float
    grad_norm: float  # before it was clipped
    lr: float
    memory_bytes: tuple[int, ...]  # the most that each rank has held so far
    flops_share: float  # of the floating-point operations that the ranks could have done meanwhile
    num_skipped_rows: int = 0  # of the data, so far
    eval_loss: float | None = None  # of an evaluation after this step

    @property
    def tokens_per_s(self) -> float:
        """Of all ranks."""
        return self.num_tokens / self.seconds
