"""Ranks of a training as Ray actors, in a placement group, each in a process of its own.

An attempt takes its room in the cluster, numbers the ranks by node, lets them meet at rank 0's address and waits. Each
has fresh actors: a torch world that has lost a rank is of no more use. While a lost node's room is missing, the next
attempt waits for it, and goes on with what Ray's autoscaler or an operator brings.
"""

import logging
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.local_ray import RaySession
from cluster.node_address import interface_of
from cluster.room import Bundle, find_shortage
from longctx.errors import LongctxError
from longctx.heap import heap_env
from longctx.terminal_log import log_to_terminal
from longctx.training.config import TrainConfig
from longctx.training.gang import GRACE_S, StoppedError, is_bad, settle
from longctx.training.place import RankOrder, RankOutcome, find_port, make_places, order_ranks
from longctx.training.rank import run_rank
from longctx.training.stop import request_stop

logger = logging.getLogger(__name__)

POLL_S = 0.5
RETRY_S = 2.0  # until Ray has noticed that a node is gone, it still places ranks there


class TrainRank:
    """One rank: an actor with two threads, one that trains and one that can be asked to stop it."""

    def where(self) -> tuple[str, str, int]:
        """The node's name, its address, and a port that is free there."""
        address = ray.util.get_node_ip_address()
        return f"{address} ({ray.get_runtime_context().get_node_id()[:8]})", address, find_port(address)

    def run(self, order: RankOrder) -> RankOutcome:
        """Train; returns how it ended."""
        rank = order.place.global_rank
        log_to_terminal(f"rank {rank}" if rank else "", logging.WARNING if rank else logging.INFO)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface_of(ray.util.get_node_ip_address()))
        return run_rank(order)

    def stop(self) -> None:
        """Let the training save its state and end."""
        request_stop()


class TrainGang:
    """The ranks of one training, attempt after attempt.

    Args:
        config: of the training.
        session: the connection to Ray.
        stop: once set, ranks are asked to save and end.
        body: what a rank runs, as ``"module:function"``.
    """

    def __init__(self, config: TrainConfig, session: RaySession, stop: threading.Event, body: str) -> None:
        self._config, self._session, self._stop, self._body = config, session, stop, body
        self._world_size = config.parallel.dp_degree * config.parallel.sp_degree
        self._placement: PlacementGroup | None = None
        self._actors: list[Any] = []

    def attempt(self, restart: int) -> dict[str, Any]:
        """Rank 0's report. Raises as ``settle`` does, and ``LongctxError`` if there is no room."""
        try:
            places = self._gather(restart)
            orders = [RankOrder(self._config, place, self._body) for place in places]
            running = [actor.run.remote(order) for actor, order in zip(self._actors, orders, strict=True)]
            return self._wait(running, [place.node for place in places])
        finally:
            self._release()

    def _gather(self, restart: int) -> list[Any]:
        """Actors that answer, in rank order, and their places."""
        bundle = self._choose_bundle()
        self._check_room(bundle, is_first=restart == 0)
        deadline = time.monotonic() + self._config.cluster.start_timeout_s
        while True:
            self._place(bundle, deadline)
            try:
                answers = self._ask_all("where", deadline)
                break
            except RayError as error:
                # A node that is gone; anything else would come again.
                if not isinstance(error, RayActorError) or time.monotonic() > deadline:
                    raise LongctxError(f"the ranks cannot start: {error}") from None
                self._release()
                time.sleep(RETRY_S)
        order = order_ranks([node for node, _, _ in answers])
        self._actors = [self._actors[index] for index in order]
        _, address, port = answers[order[0]]
        return make_places([answers[index][0] for index in order], address=address, port=port, restart=restart)

    def _choose_bundle(self) -> Bundle:
        cluster, device = self._config.cluster, self._config.model.device
        gpus = cluster.gpus_per_rank
        if gpus is None:
            has_gpus = device == "cuda" or (device == "auto" and ray.cluster_resources().get("GPU", 0) > 0)
            gpus = float(has_gpus)
        return Bundle(cluster.cpus_per_rank, gpus)

    def _check_room(self, bundle: Bundle, *, is_first: bool) -> None:
        """Fail at once if the cluster can never hold the ranks; one that grows, or has lost a node, is waited for."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        shortage = find_shortage(nodes, self._world_size, bundle, self._config.cluster.strategy)
        if not shortage:
            return
        parallel = self._config.parallel
        told = (
            f"{self._world_size} ranks (parallel.dp_degree={parallel.dp_degree} x parallel.sp_degree="
            f"{parallel.sp_degree}) do not fit this Ray cluster: {shortage}"
        )
        if is_first and not _can_grow():
            raise LongctxError(told)
        logger.warning("%s; waiting at most %g s (cluster.start_timeout_s)", told, self._config.cluster.start_timeout_s)

    def _place(self, bundle: Bundle, deadline: float) -> None:
        """Reserve the room and create an actor in each bundle."""
        cluster = self._config.cluster
        self._placement = placement_group([bundle.resources] * self._world_size, strategy=cluster.strategy)
        while not self._placement.wait(POLL_S):
            self._check_session()
            if time.monotonic() > deadline:
                cpus, gpus = (ray.available_resources().get(name, 0.0) for name in ("CPU", "GPU"))
                raise LongctxError(
                    f"no room for {self._world_size} ranks of {bundle} within {cluster.start_timeout_s:g} s "
                    f"(cluster.start_timeout_s): {cpus:g} CPUs and {gpus:g} GPUs are free"
                )
        create = ray.remote(TrainRank)
        self._actors = [
            create.options(
                num_cpus=bundle.num_cpus,
                num_gpus=bundle.num_gpus,
                max_concurrency=2,
                max_restarts=0,
                runtime_env={"env_vars": heap_env(self._config.train.compact_heap)},
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._placement, placement_group_bundle_index=index
                ),
            ).remote()
            for index in range(self._world_size)
        ]

    def _ask_all(self, method: str, deadline: float) -> list[Any]:
        """What each actor answers, in order."""
        pending = answers = [getattr(actor, method).remote() for actor in self._actors]
        while pending:
            _, pending = ray.wait(pending, num_returns=len(pending), timeout=POLL_S)
            self._check_session()
            if time.monotonic() > deadline:
                raise LongctxError(
                    f"{len(pending)} of {self._world_size} ranks did not start in time (cluster.start_timeout_s)"
                )
        return ray.get(answers)

    def _wait(self, running: list[Any], nodes: list[str]) -> dict[str, Any]:
        """Until all ranks have ended, or one did badly and the others had time to say why."""
        outcomes: dict[int, RankOutcome] = {}
        lost: dict[int, str] = {}
        pending, was_told, deadline = running, False, float("inf")
        while pending and time.monotonic() < deadline:
            done, pending = ray.wait(pending, num_returns=1, timeout=POLL_S)
            if not self._session.is_running():
                raise LongctxError("Ray stopped under longctx")
            if self._stop.is_set() and not was_told:
                was_told = True
                for actor in self._actors:
                    actor.stop.remote()
            for reference in done:
                rank = running.index(reference)
                try:
                    outcomes[rank] = _read(reference)
                except RayError as error:
                    lost[rank] = f"on node {nodes[rank]} was lost: {_explain(error)}"
                if is_bad(outcomes.get(rank)):
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        return settle(outcomes, lost)

    def _check_session(self) -> None:
        """Before ranks run there is nothing to save: a request to stop ends it here."""
        if not self._session.is_running():
            raise LongctxError("Ray stopped under longctx")
        if self._stop.is_set():
            raise StoppedError("stopped before the ranks had started")

    def _release(self) -> None:
        """End the actors and give the room back."""
        if not self._session.is_running():
            return
        for actor in self._actors:
            with suppress(Exception):  # each is tried whatever became of the one before
                ray.kill(actor)
        self._actors = []
        if self._placement is not None:
            with suppress(Exception):
                remove_placement_group(self._placement)
            self._placement = None


def _read(reference: Any) -> RankOutcome:
    """How a rank ended; raises ``RayError`` if it was lost."""
    try:
        return ray.get(reference)
    except RayTaskError as error:  # outside its body: an import, or an answer that does not pickle
        return RankOutcome(error=LongctxError(f"a rank cannot run: {error}"))


def _explain(error: RayError) -> str:
    """The line of Ray's report that says why."""
    lines = str(error).splitlines()
    return next((line.strip() for line in lines if "dead because" in line), lines[0])


def _can_grow() -> bool:
    """Whether an autoscaler brings nodes to a cluster that is too small."""
    from ray._private import state

    limits: Sequence[Any] | dict[str, Any] | None = state.state.get_max_resources_from_cluster_config()
    return bool(limits)
