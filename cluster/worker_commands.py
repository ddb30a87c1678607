"""``longctx worker add`` and ``longctx worker drain``: a running deployment gets another worker, or lets one go.

They join the deployment's Ray cluster. The router looks at which workers there are once a second.
"""

import logging
import time
from typing import Any

from cluster.config import RayConfig, ServeConfig, WorkerAddConfig, WorkerDrainConfig
from cluster.local_ray import RaySession
from longctx.errors import ConfigError, LongctxError

logger = logging.getLogger(__name__)

POLL_S = 0.5
ANSWER_TIMEOUT_S = 30.0


def add(config: WorkerAddConfig) -> int:
    """Start one more worker like the others of its role; returns once it can be used. Raises ``LongctxError``."""
    session = _join(config.ray)
    try:
        name = _add(config)
    finally:
        session.stop()
    logger.info("%s has loaded the model; requests come within a second", name)
    return 0


def drain(config: WorkerDrainConfig) -> int:
    """Let a worker finish what it has, and then end or restart it. Raises ``LongctxError``."""
    if config.name is None:
        raise ConfigError("name is missing: the worker, as longctx status shows it, as name=decode-1")
    session = _join(config.ray)
    try:
        _drain(config, config.name)
    finally:
        session.stop()
    return 0


def _join(config: RayConfig) -> RaySession:
    if config.address is None:
        raise ConfigError(
            "ray.address is missing: the cluster in which the deployment runs, or auto; a deployment with a Ray of its "
            "own has the workers that it was started with"
        )
    session = RaySession(config)
    session.start()
    return session


def _list(namespace: str) -> dict[str, Any]:
    from cluster.ray_handle import list_workers

    workers = {handle.name: handle for handle in list_workers(namespace)}
    if not workers:
        raise LongctxError(
            f"no deployment of longctx is in the namespace {namespace!r} of this cluster (ray.namespace)"
        )
    return workers


def _add(config: WorkerAddConfig) -> str:
    import ray

    from cluster.worker_actors import create_another, start_workers, wait_for_workers

    workers = _list(config.ray.namespace)
    one: Any = next(iter(workers.values()))
    deployment: ServeConfig = ray.get(one.actor.describe_deployment.remote(), timeout=ANSWER_TIMEOUT_S)
    if config.role == "prefill" and not deployment.cluster.num_prefill_workers:
        raise LongctxError("this deployment has no prefill workers, and its decode workers take no KV: add role=decode")
    group = create_another(deployment, config.role, outlives_us=True)
    try:
        wait_for_workers(start_workers([group]), timeout_s=deployment.cluster.start_timeout_s)
    except BaseException:
        group.kill()
        raise
    return group.handle.name


def _drain(config: WorkerDrainConfig, name: str) -> None:
    import ray

    from cluster.actors import kill_worker

    workers = _list(config.ray.namespace)
    if name not in workers:
        raise ConfigError(f"name={name} is not allowed: one of {', '.join(sorted(workers))}")
    handle = workers[name]
    ray.get(handle.actor.drain.remote(config.then != "undo"), timeout=ANSWER_TIMEOUT_S)
    if config.then == "undo":
        logger.info("%s takes requests again", name)
        return
    deadline, told = time.monotonic() + config.timeout_s, -1
    while True:
        left: Any = ray.get(handle.actor.count_requests.remote(), timeout=ANSWER_TIMEOUT_S)
        if not left:
            break
        if left != told:
            logger.info("%s drains: %d requests left", name, left)
            told = left
        if time.monotonic() > deadline:
            raise LongctxError(f"{name} still has {left} requests after {config.timeout_s:g} s; it goes on draining")
        time.sleep(POLL_S)
    if config.then == "remove":
        kill_worker(handle, config.ray.namespace)
    elif config.then == "restart":
        ray.kill(handle.actor, no_restart=False)
    logger.info(
        "%s has nothing left%s",
        name,
        {"remove": ", and has ended", "restart": ", and starts anew"}.get(config.then, ""),
    )
