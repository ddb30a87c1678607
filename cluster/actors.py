"""The workers as Ray actors: the only module that wraps them. Everything else of theirs runs without Ray."""

import dataclasses
import logging
from typing import Any

import ray

from cluster.config import ServeConfig
from cluster.decode_worker import DecodeWorker
from cluster.prefill_worker import PrefillWorker
from cluster.ray_handle import RayHandle
from cluster.terminal import log_to_terminal

MAX_RESTARTS = 20  # by Ray, after a worker process died; the router makes it load the model again
MAX_CALLS = 1024  # coroutines of one actor at a time


class PrefillActor(PrefillWorker):
    """A prefill worker in a process of its own."""

    def __init__(self, name: str, config: ServeConfig) -> None:
        super().__init__(name, _on_this_node(name, config), node_id=ray.get_runtime_context().get_node_id())


class DecodeActor(DecodeWorker):
    """A decode worker in a process of its own."""

    def __init__(self, name: str, config: ServeConfig) -> None:
        super().__init__(name, _on_this_node(name, config), node_id=ray.get_runtime_context().get_node_id())


ACTORS = {"prefill": PrefillActor, "decode": DecodeActor}


def create_worker(name: str, role: str, config: ServeConfig, *, num_cpus: float, env_vars: dict[str, str]) -> RayHandle:
    """Create the actor ``name``; it loads nothing before its ``start``."""
    options: dict[str, Any] = {
        "name": name,
        "namespace": config.ray.namespace,
        "num_cpus": num_cpus,
        "max_concurrency": MAX_CALLS,
        "max_restarts": MAX_RESTARTS,
        "max_task_retries": 0,
        "scheduling_strategy": "SPREAD",
    }
    if env_vars:
        options["runtime_env"] = {"env_vars": env_vars}
    return RayHandle(name, role, ray.remote(ACTORS[role]).options(**options).remote(name, config))


def _on_this_node(name: str, config: ServeConfig) -> ServeConfig:
    """Logging for this process, and the node's address for what listens here."""
    log_to_terminal(name, logging.INFO)
    logging.getLogger("longctx.models.loading").setLevel(logging.WARNING)  # the engine's line says as much
    if config.transport.host is not None:
        return config
    transport = dataclasses.replace(config.transport, host=ray.util.get_node_ip_address())
    return dataclasses.replace(config, transport=transport)
