"""Where the records of steps go: one module each, by name. Nothing is imported before it is used."""

from parallel.registry import Registry

SINKS = Registry(
    "log",
    {
        "metrics": "longctx.training.sinks.metrics_file:MetricsFile",
        "lines": "longctx.training.sinks.lines:StepLines",
        "progress": "longctx.training.sinks.progress_bar:ProgressBar",
        "tensorboard": "longctx.training.sinks.tensorboard:TensorBoardFiles",
        "wandb": "longctx.training.sinks.wandb:WandbRun",
    },
)
