"""A worker actor as the router sees it. Knows nothing of what the actor runs, and so loads no torch."""

import asyncio
import os
import re
import signal
import time
from contextlib import suppress
from contextvars import Context
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError, TaskCancelledError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.handle import Roster
from cluster.messages import WorkerInfo
from longctx.errors import LongctxError, WorkerLostError

END_TIMEOUT_S = 10.0
WORKER_NAME = re.compile(r"(prefill|decode)-(\d+)")


class RayHandle:
    """See ``cluster.handle.WorkerHandle``."""

    def __init__(self, name: str, role: str, actor: Any) -> None:
        self._name, self._role, self._actor = name, role, actor

    @property
    def name(self) -> str:
        """The worker's name."""
        return self._name

    @property
    def role(self) -> str:
        """The worker's role."""
        return self._role

    @property
    def is_far(self) -> bool:
        """It is another process, mostly on another machine."""
        return True

    @property
    def actor(self) -> Any:
        """Ray's handle."""
        return self._actor

    async def call(self, method: str, /, *args: Any) -> Any:
        """See ``WorkerHandle.call``.

        In a context of its own: when a client leaves, Serve cancels every Ray task that was begun in its request's,
        the ``cancel`` that frees its pages among them.
        """
        try:
            return await Context().run(getattr(self._actor, method).remote, *args)
        except RayTaskError as error:
            raise error.cause or error from None
        except TaskCancelledError:  # says nothing of the worker
            raise LongctxError(f"a call to {self._name} was cancelled") from None
        except ActorUnavailableError:
            raise WorkerLostError(f"the process of {self._name} ended; Ray starts it again") from None
        except RayActorError:
            raise WorkerLostError(f"the process of {self._name} ended for good") from None
        except RayError as error:
            raise WorkerLostError(f"{self._name} cannot be reached: {str(error).splitlines()[0]}") from None

    async def end_process(self, info: WorkerInfo) -> None:
        """By a task on its node: a process that is frozen hears nothing, Ray's own way to end it included."""
        where: Any = NodeAffinitySchedulingStrategy(info.node_id, soft=False)
        end: Any = ray.remote(num_cpus=0, scheduling_strategy=where, max_retries=0)(_end_process)
        with suppress(RayError, TimeoutError):  # the node cannot be reached
            async with asyncio.timeout(END_TIMEOUT_S):
                await Context().run(end.remote, info.pid, time.time() + END_TIMEOUT_S)


def _end_process(pid: int, until: float) -> None:
    """SIGKILL to a worker's process, unless it is later than ``until``, in seconds since the epoch: it may be well."""
    with suppress(OSError):
        if time.time() < until and b"WorkerActor" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)


def make_roster(namespace: str) -> Roster:
    """The worker actors of a namespace, by their names."""

    async def roster() -> list[RayHandle]:
        return await asyncio.to_thread(list_workers, namespace)

    return roster


def list_workers(namespace: str) -> list[RayHandle]:
    """The worker actors of a namespace, without their other ranks; prefill workers first, each by its number."""
    found = []
    matches = filter(None, map(WORKER_NAME.fullmatch, list_actors(namespace)))
    for match in sorted(matches, key=lambda match: (match[1] != "prefill", int(match[2]))):
        with suppress(ValueError):  # it has gone meanwhile
            found.append(find_worker(match[0], match[1], namespace))
    return found


def list_actors(namespace: str) -> list[str]:
    """Names of a namespace's actors."""
    entries: list[Any] = ray.util.list_named_actors(all_namespaces=True)
    return [entry["name"] for entry in entries if entry["namespace"] == namespace]


def find_worker(name: str, role: str, namespace: str) -> RayHandle:
    """The actor ``name`` that was created elsewhere."""
    return RayHandle(name, role, ray.get_actor(name, namespace=namespace))
