"""The curves of a run, by the names that TensorBoard and Weights & Biases group them by."""

from longctx.training.record import StepRecord


def list_scalars(record: StepRecord) -> dict[str, float]:
    """A step's points on every curve."""
    scalars = {
        "train/loss": record.loss,
        "train/grad_norm": record.grad_norm,
        "train/lr": record.lr,
        "train/num_trained_tokens": float(record.num_trained_tokens),
        "train/num_skipped_rows": float(record.num_skipped_rows),
        "speed/tokens_per_s": record.tokens_per_s,
        "speed/flops_share": record.flops_share,
        "speed/seconds": record.seconds,
    }
    scalars |= {f"memory/rank_{rank}_bytes": float(size) for rank, size in enumerate(record.memory_bytes)}
    if record.eval_loss is not None:
        scalars["eval/loss"] = record.eval_loss
    return scalars
