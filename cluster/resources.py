"""What Ray reserves for each process that serves: arithmetic over the nodes' resources, without Ray."""

from collections.abc import Sequence

from cluster.config import ServeConfig


def share_resources(config: ServeConfig, nodes: Sequence[dict[str, float]], role: str) -> tuple[float, float]:
    """CPUs and GPUs that Ray is to reserve for each process. Without a GPU of its own a process sees none.

    Args:
        config: the deployment's.
        nodes: resources of each node that is alive.
        role: of the worker.
    """
    cluster = config.cluster
    cpus, gpus = (sum(node.get(kind, 0) for node in nodes) / cluster.num_processes for kind in ("CPU", "GPU"))
    num_cpus = cluster.worker_cpus or max(0.05, min(1.0, cpus))
    own = cluster.group_of(role).worker_gpus
    if config.model.device == "cpu":
        return num_cpus, 0.0
    if own is not None:
        return num_cpus, own
    return num_cpus, min(1.0, int(gpus * 100) / 100) if cluster.worker_gpus is None else cluster.worker_gpus
