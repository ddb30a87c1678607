"""What can be wrong with ``longctx train`` before anything runs, found in two seconds and without Ray or torch."""

import os

from longctx.errors import ConfigError
from longctx.training.config import TrainConfig


def check_config(config: TrainConfig) -> None:
    """Raise ``ConfigError`` for keys that are allowed each, but not together; the text says what would fit."""
    parallel, batch_size = config.parallel, config.train.batch_size
    if batch_size % parallel.dp_degree:
        lower = batch_size // parallel.dp_degree * parallel.dp_degree
        fits = " or ".join(str(size) for size in (lower, lower + parallel.dp_degree) if size)
        raise ConfigError(
            f"train.batch_size={batch_size} is not allowed with parallel.dp_degree={parallel.dp_degree}: each group "
            f"of ranks trains on as many sequences; a batch of {fits} would fit"
        )


def check_cores(config: TrainConfig) -> None:
    """Raise ``ConfigError`` if a Ray of our own on this machine has fewer CPUs than the ranks reserve."""
    num_ranks = config.parallel.dp_degree * config.parallel.sp_degree
    num_cores = len(os.sched_getaffinity(0))
    if num_ranks * config.cluster.cpus_per_rank <= num_cores:
        return
    raise ConfigError(
        f"parallel.dp_degree={config.parallel.dp_degree} x parallel.sp_degree={config.parallel.sp_degree} are "
        f"{num_ranks} ranks of {config.cluster.cpus_per_rank:g} CPUs, and this machine has {num_cores}; "
        f"cluster.cpus_per_rank={int(100 * num_cores / num_ranks) / 100:g} lets them share cores, "
        "cluster.address=HOST:PORT takes a Ray cluster"
    )
