"""The endpoint on Ray Serve: one replica that holds the router.

The replica listens itself: Serve places it, watches it and restarts it, and no token passes another process on its way
out. Where Serve has an HTTP proxy that listens, in a cluster that was joined, requests come through that.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions
from starlette.applications import Starlette

from cluster.autoscale.autoscaler import Exchange
from cluster.config import ServeConfig
from cluster.endpoint import make_app
from cluster.listener import ENDING_S, Listener
from cluster.messages import Observation, ScalingReport
from cluster.ray_handle import list_workers, make_roster
from cluster.router import Router
from cluster.serving import ServedModel
from cluster.standby import Turn
from longctx.errors import ConfigError
from longctx.terminal_log import log_to_terminal

if TYPE_CHECKING:
    from longctx.models.tokenizer import Tokenizer

MAX_ONGOING = 100_000  # ours to refuse (server.max_requests), with an answer that says so
GRACE_S = 3.0
HEALTH_PERIOD_S, HEALTH_TIMEOUT_S = 2.0, 4.0  # of three that are missed Serve replaces the process
HEAD_RESOURCE = "node:__internal_head__"  # Ray gives it to the head node
SERVE_CONTROLLER_NAME, SERVE_NAMESPACE = "SERVE_CONTROLLER_ACTOR", "serve"
SERVE_TIMEOUT_S = 30.0
STANDBY_DELAY_S, STANDBY_POLL_S = 5.0, 0.05
ENDPOINT_FOLDER = Path("/tmp")  # of the head node, where processes of the endpoint know each other by a file

logger = logging.getLogger(__name__)
EXCHANGE_TIMEOUT_S = 10.0


class ServeApp:
    """The endpoint of one deployment, in the Serve of the Ray that this process is connected to.

    Args:
        config: the deployment's.
        folder: of this deployment alone, on this host; None: in a cluster that was joined.
    """

    def __init__(self, config: ServeConfig, *, folder: Path | None = None) -> None:
        self._config = config
        self._is_here = folder is not None
        self._turn_file = (folder or ENDPOINT_FOLDER) / f"longctx-endpoint-{secrets.token_hex(8)}.turn"
        self.has_proxy = config.server.proxy is True  # or what ``join`` finds
        self._name = config.ray.namespace
        self._owns_serve = True  # nobody else used Serve before us
        self._is_deployed = False
        self.found_serve = False  # one runs already
        self.found_endpoint = False  # with an endpoint of this name in it

    def join(self) -> None:
        """Look for a Serve that runs; raises ``ConfigError`` if it listens elsewhere: a cluster has one."""
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        try:
            controller: Any = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        except ValueError:
            return
        if self._config.server.proxy is None:
            location = ray.get(controller.get_proxy_location.remote(), timeout=SERVE_TIMEOUT_S)
            self.has_proxy = location not in (None, "Disabled")
        if self.has_proxy:
            self._check_proxy(ray.get(controller.get_http_config.remote(), timeout=SERVE_TIMEOUT_S))
        self.found_serve = True
        applications = set(serve.status().applications)
        self.found_endpoint = self._name in applications  # left by one that was killed
        self._owns_serve = applications == {self._name}

    def _check_proxy(self, found: Any) -> None:
        server = self._config.server
        if (found.host, found.port) != (server.host, server.port):
            raise ConfigError(
                f"server.host={server.host} server.port={server.port} is not possible: this cluster's Ray Serve "
                f"listens already; use server.host={found.host} server.port={found.port}"
            )
        if (found.ssl_certfile, found.ssl_keyfile) != (server.tls_certificate, server.tls_key):
            raise ConfigError(
                f"server.tls_certificate={server.tls_certificate} server.tls_key={server.tls_key} is not possible: "
                "this cluster's Ray Serve listens already, and keeps that until it is stopped (serve shutdown); use "
                f"server.tls_certificate={found.ssl_certfile or 'null'} server.tls_key={found.ssl_keyfile or 'null'}"
            )

    def deploy(self, model: ServedModel) -> None:
        """Start Serve and the endpoint on ``server.host:server.port``; returns when it answers.

        The worker actors have been created. ``model``: how clients see it.
        """
        self._is_deployed = True
        server = self._config.server
        options = HTTPOptions(
            host=server.host, port=server.port, ssl_certfile=server.tls_certificate, ssl_keyfile=server.tls_key
        )
        location = "HeadOnly" if self.has_proxy else "Disabled"
        if self.found_endpoint and not self.has_proxy:
            serve.delete(self._name)  # it has the port
        if self.has_proxy or not self.found_serve:
            serve.start(proxy_location=location, http_options=options, logging_config={"log_level": "WARNING"})
        if self.has_proxy:
            build = _make_builder(self._config, model)
            behind: Any = serve.deployment(**deployment_options())(serve.ingress(build)(BehindProxy))
            serve.run(behind.bind(), name=self._name, route_prefix="/")
        else:
            turn_file = self._turn_file if server.standby else None
            listening: Any = serve.deployment(**deployment_options(1 if turn_file is None else 2))(_Listening)
            serve.run(listening.bind(self._config, model, turn_file), name=self._name, route_prefix=None)

    def make_exchange(self) -> Exchange:
        """How the autoscaler reaches the endpoint, whichever replica holds it."""
        logging.getLogger("ray.serve").setLevel(logging.ERROR)  # a replica that dies is ours to tell
        handles: list[Any] = []

        async def exchange(report: ScalingReport) -> Observation:
            if not handles:
                handles.append(await asyncio.to_thread(serve.get_app_handle, self._name))
            async with asyncio.timeout(EXCHANGE_TIMEOUT_S):
                while True:  # Serve knows no difference between the replica that serves and the one that stands by
                    observation = await handles[0].exchange.remote(report)
                    if observation is not None:
                        return observation
                    await asyncio.sleep(0.05)

        return exchange

    def withdraw(self) -> None:
        """End the endpoint if it was begun, and Serve with it unless others use it."""
        if not self._is_deployed:
            return
        self._end_turns()
        if not self._owns_serve or set(serve.status().applications) - {self._name}:
            serve.delete(self._name)
        else:
            serve.shutdown()

    def _end_turns(self) -> None:
        """Nobody takes over from who stops now."""
        if self.has_proxy:
            return
        if self._is_here:
            _remove(self._turn_file)
            return
        remove: Any = ray.remote(num_cpus=0, resources={HEAD_RESOURCE: 0.001})(_remove)
        try:
            ray.get(remove.remote(self._turn_file), timeout=SERVE_TIMEOUT_S)
        except RayError as error:
            logger.warning("%s stays on the head node: %s", self._turn_file, error)


class BehindProxy:
    """What Serve wraps, which adds ``app``: the application is all of it."""

    app: Starlette

    async def exchange(self, report: ScalingReport) -> Observation:
        """See ``PoolBoard.exchange``."""
        return await self.app.state.board.exchange(report)


class _Listening:
    """A replica that listens itself, or stands by for the one that does.

    Serve waits for the constructor, asks for its health and calls ``__del__``.
    """

    async def __init__(self, config: ServeConfig, model: ServedModel, turn_file: Path | None) -> None:
        self._config, self._model = config, model
        self._listener: Listener | None = None
        self._standing_by: asyncio.Task[None] | None = None
        self._turn = None if turn_file is None else Turn(turn_file, patience_s=config.server.standby_timeout_s)
        if self._turn is None or self._turn.take():
            await self._begin(load_endpoint(config))
        else:
            self._standing_by = asyncio.create_task(self._stand_by(self._turn))

    async def _begin(self, tokenizer: "Tokenizer") -> None:
        self._app = make_router_app(self._config, self._model, tokenizer)
        self._listener = Listener(self._app, self._config.server, grace_s=GRACE_S)
        await self._listener.start()

    async def _stand_by(self, turn: Turn) -> None:
        await asyncio.sleep(STANDBY_DELAY_S)  # what serves starts faster alone
        tokenizer = await asyncio.to_thread(load_endpoint, self._config)
        await asyncio.to_thread(list_workers, self._config.ray.namespace)  # so that Ray knows what actors they are
        while not turn.take():
            if turn.is_over():
                return
            turn.free_from_frozen()
            await asyncio.sleep(STANDBY_POLL_S)
        if not turn.is_over():
            logger.warning("the endpoint is gone: this process, which stood by, serves from now on")
            await self._begin(tokenizer)

    async def exchange(self, report: ScalingReport) -> Observation | None:
        """See ``PoolBoard.exchange``; None: another replica serves."""
        return None if self._listener is None else await self._app.state.board.exchange(report)

    async def check_health(self) -> None:
        if self._listener is not None:
            self._listener.check()
        elif self._standing_by is not None and self._standing_by.done():
            self._standing_by.result()  # raises what ended it

    async def __del__(self) -> None:
        if self._standing_by is not None:
            self._standing_by.cancel()
        if self._listener is not None:
            await self._listener.stop()
        if self._turn is not None:
            self._turn.close()


def deployment_options(num_replicas: int = 1) -> dict[str, Any]:
    """How Serve runs the endpoint."""
    return {
        "name": "endpoint",
        "num_replicas": num_replicas,
        "max_ongoing_requests": MAX_ONGOING,
        "ray_actor_options": {"num_cpus": 0, "resources": {HEAD_RESOURCE: 0.001}},  # one host to lose
        "graceful_shutdown_timeout_s": GRACE_S + ENDING_S,
        "graceful_shutdown_wait_loop_s": 0.2,
        "health_check_period_s": HEALTH_PERIOD_S,
        "health_check_timeout_s": HEALTH_TIMEOUT_S,
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
    }


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def load_endpoint(config: ServeConfig) -> "Tokenizer":
    """What takes long of the endpoint's start, in its process: neither torch nor an engine is loaded."""
    from longctx.models.checkpoint import inspect_checkpoint
    from longctx.models.tokenizer import load_tokenizer

    log_to_terminal("endpoint", logging.WARNING)
    logging.getLogger("cluster.router").setLevel(logging.INFO)  # workers that come and go
    return load_tokenizer(inspect_checkpoint(config.model.path), config.model.chat_template)


def make_router_app(config: ServeConfig, model: ServedModel, tokenizer: "Tokenizer") -> Starlette:
    """The application, with a router of its own: workers give up what another one asked."""
    handles = list_workers(config.ray.namespace)  # some may have come or gone since the deployment began
    roster = make_roster(config.ray.namespace)
    return make_app(Router(handles, config, model=model, tokenizer=tokenizer, roster=roster), config.server)


def _make_builder(config: ServeConfig, model: ServedModel) -> Callable[[], Starlette]:
    def build() -> Starlette:
        return make_router_app(config, model, load_endpoint(config))

    return build
