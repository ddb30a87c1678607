"""Ray, the workers and the endpoint of one ``longctx serve``: up in the order that waits least, down in the order that
loses nothing. Worker actors and Serve start side by side; a start that fails says why."""

import asyncio
import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from cluster.config import ServeConfig
from cluster.local_ray import RaySession
from cluster.port import check_port
from cluster.serving import ServedModel
from cluster.tls import client_context
from longctx.errors import ConfigError, LongctxError

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 15.0
READY_TIMEOUT_S = 60.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Deployment:
    """Ray, the workers and the endpoint of one ``longctx serve``."""

    def __init__(self, config: ServeConfig, model: ServedModel) -> None:
        self._config, self._model = config, model
        self._session = RaySession(config.ray, shares_cores=config.cluster.max_processes > 1)
        self._groups: list[Any] = []  # ActorGroup of each worker
        self._strangers: set[str] | None = None  # workers that were there before; None: ours were not begun
        self._app: Any = None  # a ServeApp, once Ray runs
        self._autoscaler: Any = None  # an AutoscalerThread, once the endpoint answers
        self._deploying: threading.Thread | None = None
        self._host = config.server.host

    def start(self) -> None:
        """Everything up; raises ``LongctxError`` saying why not."""
        self._session.start()
        import ray

        nodes = [node for node in ray.nodes() if node["Alive"]]
        self._place_endpoint(nodes)
        self._create_workers(nodes)
        from cluster.worker_actors import start_workers, wait_for_workers

        starts = start_workers(self._groups)
        failure: list[BaseException] = []
        deploying = self._deploying = threading.Thread(target=_catch, args=(failure, self._deploy), daemon=True)
        deploying.start()
        wait_for_workers(starts, timeout_s=self._config.cluster.start_timeout_s, failure=failure)
        deploying.join(self._config.cluster.start_timeout_s)
        if failure or deploying.is_alive():
            raise LongctxError(f"the endpoint did not start: {failure[0] if failure else 'no answer in time'}")
        self._await_health()
        if self._config.cluster.autoscale.enabled:
            from cluster.autoscale.ray_fleet import AutoscalerThread

            self._autoscaler = AutoscalerThread(self._config, self._app.make_exchange())
            self._autoscaler.start()

    @property
    def url(self) -> str:
        """Where it answers, as clients write it."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        scheme = "http" if self._config.server.tls_certificate is None else "https"
        return f"{scheme}://{host}:{self._config.server.port}/v1"

    def is_running(self) -> bool:
        """Whether Ray is still there."""
        return self._session.is_running()

    def stop(self) -> None:
        """Everything down, in the order that loses nothing; a joined cluster keeps running."""
        if self._session.is_running():
            closing = threading.Thread(target=_catch, args=([], self._close), daemon=True)
            closing.start()
            while closing.is_alive() and self._session.is_running():  # Ray may be told to end just as we are
                closing.join(0.1)
        self._session.stop()

    def kill(self) -> None:
        """Everything of a local Ray down at once; in a joined one, workers end with this process."""
        if self._app is not None and not self._session.is_local:
            logger.warning("the endpoint stays in the cluster, not ready, until the next start replaces it")
        self._session.kill()

    def _close(self) -> None:
        """Endpoint and workers; each step is tried whatever became of the one before."""
        import ray

        if self._autoscaler is not None:  # or workers would still come
            self._autoscaler.stop(CLOSE_TIMEOUT_S)
        self._withdraw()
        with suppress(Exception):
            closing = [group.handle.actor.close.remote() for group in self._groups]
            ray.wait(closing, num_returns=len(closing), timeout=CLOSE_TIMEOUT_S)
        for group in self._groups:
            group.kill()
        with suppress(Exception):
            from cluster.actors import kill_worker
            from cluster.ray_handle import list_workers

            namespace = self._config.ray.namespace
            workers = [] if self._strangers is None else list_workers(namespace)
            for handle in workers:
                if handle.name not in (self._strangers or ()):  # longctx worker add made it for us
                    kill_worker(handle, namespace)

    def _withdraw(self) -> None:
        """The endpoint down, also in the middle of its deployment: Ray's end under that thread would crash us."""
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        while self._app is not None and time.monotonic() < deadline:
            with suppress(Exception):
                self._app.withdraw()
            if self._deploying is None or not self._deploying.is_alive():
                return
            self._deploying.join(0.5)

    def _place_endpoint(self, nodes: list[dict[str, Any]]) -> None:
        """Serve listens on the head node; raises ``ConfigError`` if the endpoint cannot be there."""
        import ray

        from cluster.serve_app import ServeApp

        server = self._config.server
        head = next(node["NodeManagerAddress"] for node in nodes if "node:__internal_head__" in node["Resources"])
        is_here = head == ray.util.get_node_ip_address()
        if not is_here and server.host in LOOPBACK:
            raise ConfigError(
                f"server.host={server.host} is not reachable from here: the endpoint runs on the head node {head}; "
                "use server.host=0.0.0.0"
            )
        self._host = {"0.0.0.0": "127.0.0.1" if is_here else head, "::": "::1" if is_here else head}.get(
            server.host, server.host
        )
        app = ServeApp(self._config, folder=self._session.folder)
        app.join()
        is_ours = app.found_serve if app.has_proxy else app.found_endpoint  # who listens there
        if is_here and not self._session.is_local and not is_ours:
            check_port(server)
        self._app = app

    def _create_workers(self, nodes: list[dict[str, Any]]) -> None:
        from cluster.ray_handle import list_workers
        from cluster.worker_actors import create_workers

        self._strangers = {handle.name for handle in list_workers(self._config.ray.namespace)}
        # a local Ray's processes have the thread settings from us
        shares_cores = not self._session.is_local and self._config.cluster.max_processes > len(nodes)
        for group in create_workers(self._config, nodes, shares_cores=shares_cores):
            self._groups.append(group)  # one by one: those that there are end with us if the next cannot be

    def _deploy(self) -> None:
        self._app.deploy(self._model)

    def _await_health(self) -> None:
        """Until the endpoint says it is ready: the router has found the workers."""
        import httpx

        url = self.url.removesuffix("/v1") + "/health"
        # By its certificate alone: the names in that are for clients elsewhere.
        verify = client_context(dataclasses.replace(self._config.server, tls_ca=None))
        deadline = time.monotonic() + READY_TIMEOUT_S
        answer = "no answer"
        while time.monotonic() < deadline:
            try:
                response = httpx.get(url, timeout=5.0, trust_env=False, verify=verify)
                if response.status_code == 200:
                    return
                answer = response.text
            except httpx.HTTPError as error:
                answer = str(error)
            time.sleep(0.1)
        raise LongctxError(f"the endpoint is not ready after {READY_TIMEOUT_S:g} s: {answer}")


def _catch(failure: list[BaseException], function: Callable[..., None], *args: object) -> None:
    """Run ``function`` on a thread that keeps its exception."""
    asyncio.set_event_loop(asyncio.new_event_loop())  # Serve looks for one
    try:
        function(*args)
    except BaseException as error:  # noqa: BLE001 - the main thread raises it
        failure.append(error)
