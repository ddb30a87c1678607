"""The endpoint as an application that Ray Serve starts by itself, from a configuration file: KubeRay's RayService.

    import_path: cluster.service:build
    args: {overrides: [model.path=/data/model, cluster.num_decode_workers=2]}

``longctx serve`` owns the workers and ends with them. Here nobody but Serve stays, so the replica that holds the router
creates and owns them: they end with it, and the one that follows it makes others.
"""

import asyncio
import dataclasses
import uuid
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from starlette.applications import Starlette

from cluster.autoscale.autoscaler import Exchange
from cluster.autoscale.ray_fleet import AutoscalerThread
from cluster.config import ServeConfig
from cluster.messages import Observation, ScalingReport
from cluster.preflight import check
from cluster.serve_app import BehindProxy, deployment_options, load_endpoint, make_router_app
from cluster.serving import NotReadyError, ServedModel
from cluster.worker_actors import create_workers, start_workers, wait_for_workers
from longctx.config import compose
from longctx.errors import ConfigError


def build(args: dict[str, Any]) -> Application:
    """The application of ``longctx serve``'s configuration; Serve's proxy listens, whatever ``server.host`` says.

    Args:
        args: ``overrides``, a list of ``key=value`` and ``group=option`` as ``longctx serve`` takes them.

    Raises:
        ConfigError, CheckpointError: as ``longctx serve``.
    """
    unknown = set(args) - {"overrides"}
    if unknown:
        raise ConfigError(f"args of the application: {', '.join(unknown)} is unknown; allowed: overrides")
    config = compose(ServeConfig, "serve", [*args.get("overrides", []), "ray.address=auto"])
    if config.server.tls_certificate is not None or config.server.tls_key is not None:
        raise ConfigError(
            "server.tls_certificate and server.tls_key are not allowed here: Serve's proxy listens, with what the "
            "http_options of Serve's own configuration say: ssl_certfile and ssl_keyfile there"
        )
    config, model = check(config)

    def make() -> Starlette:
        """In the replica's process."""
        return _start(config, model)

    deployment = serve.deployment(**deployment_options())
    return deployment(serve.ingress(make)(BehindProxy)).bind()


def _start(config: ServeConfig, model: ServedModel) -> Starlette:
    """The workers up, and the application in front of them."""
    # A replica that is on its way out still has workers of these names.
    namespace = f"{config.ray.namespace}-{uuid.uuid4().hex[:8]}"
    config = dataclasses.replace(config, ray=dataclasses.replace(config.ray, namespace=namespace))
    nodes = [node for node in ray.nodes() if node["Alive"]]
    groups = list(create_workers(config, nodes, shares_cores=config.cluster.max_processes > len(nodes)))
    wait_for_workers(start_workers(groups), timeout_s=config.cluster.start_timeout_s)
    app = make_router_app(config, model, load_endpoint(config))
    app.state.workers = groups  # owned as long as the application lives
    if config.cluster.autoscale.enabled:
        app.state.autoscaler = AutoscalerThread(config, _make_exchange(app))
        app.state.autoscaler.start()
    return app


def _make_exchange(app: Starlette) -> Exchange:
    """How the autoscaler, on a thread of the replica's process, reaches the endpoint on its event loop."""

    async def exchange(report: ScalingReport) -> Observation:
        loop = app.state.board.loop
        if loop is None:
            raise NotReadyError("it has not begun yet")
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(app.state.board.exchange(report), loop))

    return exchange
