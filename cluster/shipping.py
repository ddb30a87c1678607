"""Pools and transports of one process, as the configuration wants them."""

import logging
from collections.abc import Callable

from cluster.config import ClusterConfig
from cluster.policies import POLICIES
from longctx.engine.build import MakePool
from memory.config import TransportConfig
from memory.layout import KVLayout
from memory.pages import PagePool
from memory.transport import AUTO, TRANSPORTS, KVReceiver, KVSender

logger = logging.getLogger(__name__)


def sends(cluster: ClusterConfig, role: str) -> bool:
    """Whether a worker of this role computes prompts for others."""
    return cluster.num_prefill_workers > 0 and (role == "prefill" or POLICIES.get(cluster.policy).repurposes)


def receives(cluster: ClusterConfig, role: str) -> bool:
    """Whether a worker of this role decodes prompts that others compute."""
    return cluster.num_prefill_workers > 0 and (role == "decode" or POLICIES.get(cluster.policy).repurposes)


def choose_sending_pool(config: TransportConfig) -> MakePool:
    """How pages are allocated that are to be sent."""
    if config.name != "auto":
        return TRANSPORTS.get(config.name).allocate

    def allocate(layout: KVLayout, num_pages: int) -> PagePool:
        # shared_memory's pool serves tcp as well; where /dev/shm has no room, tcp alone is left
        try:
            return TRANSPORTS.get("shared_memory").allocate(layout, num_pages)
        except OSError as error:
            logger.warning("%s; KV travels by tcp", error)
            return TRANSPORTS.get("tcp").allocate(layout, num_pages)

    return allocate


def open_senders(pool: PagePool, config: TransportConfig) -> dict[str, KVSender]:
    """A sender of each transport in use, by name."""
    senders = {}
    for name in _names(config):
        try:
            senders[name] = TRANSPORTS.get(name).make_sender(pool, config)
        except TypeError:  # auto, and the pool is not in shared memory
            if config.name != "auto":
                raise
    return senders


def open_receivers(
    pool: PagePool,
    config: TransportConfig,
    *,
    on_commit: Callable[[str, bytes], None],
    on_failed: Callable[[str, str], None],
) -> dict[str, KVReceiver]:
    """A receiver of each transport in use, by name."""
    return {
        name: TRANSPORTS.get(name).make_receiver(pool, config, on_commit=on_commit, on_failed=on_failed)
        for name in _names(config)
    }


def _names(config: TransportConfig) -> tuple[str, ...]:
    return AUTO if config.name == "auto" else (config.name,)
