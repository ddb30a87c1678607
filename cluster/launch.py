"""``longctx serve``: from a configuration to an endpoint that answers, and back to nothing, also after Ctrl-C at any
moment or a start that fails."""

import json
import logging
import os
import shlex
import signal
import sys
import threading
import time

from cluster.config import ServeConfig
from cluster.key_ring import load_keys
from cluster.preflight import check
from cluster.serving import ServedModel
from longctx.cli.stop_signals import STOP_SIGNALS, ForcedStop
from longctx.errors import LongctxError
from longctx.models.checkpoint import SHIPPED

logger = logging.getLogger(__name__)

RESTARTS = "LONGCTX_RESTARTS"  # environment variable: when this process started anew, in seconds since the epoch
HOUR_S = 3600.0
CHECK_INTERVAL_S = 0.25


class RayStoppedError(LongctxError):
    """The Ray under a deployment has ended."""


class StopRequest(BaseException):
    """SIGINT, SIGTERM or SIGHUP came; not an error."""


def serve(config: ServeConfig) -> int:
    """Serve until a signal comes; returns the exit code. If a Ray of ours dies, this process starts anew."""
    config, model = check(config)
    taken = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    try:
        return _serve(config, model)
    except RayStoppedError as error:
        if config.ray.address is not None or not (restarts := _count_restart(config.ray.max_restarts)):
            raise
        logger.error("%s: starting anew", error)
    for number in taken:
        signal.signal(number, signal.SIG_DFL)  # what is ignored stays so in the next program
    return os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {RESTARTS: restarts})


def _serve(config: ServeConfig, model: ServedModel) -> int:
    from cluster.deployment import Deployment  # what it imports takes longer than a mistake deserves

    deployment = Deployment(config, model)
    stop = threading.Event()
    previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    if previous[signal.SIGHUP] is signal.SIG_IGN:
        del previous[signal.SIGHUP]  # nohup

    def on_signal(number: int, _: object) -> None:
        if stop.is_set():
            logger.warning("forced to stop")
            for each, handler in previous.items():
                signal.signal(each, handler)
            raise ForcedStop
        logger.info("%s: stopping", signal.Signals(number).name)
        stop.set()
        raise StopRequest

    try:
        for number in previous:
            signal.signal(number, on_signal)
        logger.info("loading %s, %s", model.name, _describe(config))
        deployment.start()
        logger.info("longctx serves %s on %s; Ctrl-C stops it", model.name, deployment.url)
        logger.info("ask it: %s", _example(config, model, deployment.url))
        while deployment.is_running():
            stop.wait(CHECK_INTERVAL_S)
        raise RayStoppedError("Ray stopped under longctx")
    except StopRequest:
        return 0
    except Exception:
        if stop.is_set():  # what Ray's compiled code, or our own words for its failures, made of the StopRequest
            return 0
        raise
    finally:
        was_asked = stop.is_set()
        stop.set()  # from here on a signal forces
        try:
            deployment.stop()
        except KeyboardInterrupt:
            deployment.kill()
            raise
        finally:
            for number in previous:
                signal.signal(number, signal.SIG_IGN)  # nothing is left to stop: the exit code stands
        if was_asked:
            logger.info("stopped")


def _count_restart(limit: int) -> str:
    """The times of the last hour's starts after Ray died, for the next process, or nothing if there may be no more."""
    now = time.time()
    times = [float(word) for word in os.environ.get(RESTARTS, "").split()]
    times = [each for each in times if now - HOUR_S < each <= now]
    return " ".join(map(str, [*times, now])) if len(times) < limit else ""


def _describe(config: ServeConfig) -> str:
    """What is being started, and where, in a few words."""
    cluster = config.cluster
    where = "a Ray of its own on this machine" if config.ray.address is None else f"the Ray at {config.ray.address}"
    what = f"{config.model.path}, which ships with longctx" if config.model.path in SHIPPED else config.model.path
    workers = f"{cluster.num_prefill_workers} prefill and {cluster.num_decode_workers} decode workers"
    return f"{what}, for {workers} on {where}"


def _example(config: ServeConfig, model: ServedModel, url: str) -> str:
    """A command that asks the endpoint."""
    body = json.dumps({"model": model.name, "prompt": "import os\n", "max_tokens": 30})
    key = " -H 'Authorization: Bearer KEY'" if load_keys(config.server) else ""
    tls = config.server.tls_certificate
    trust = f" --cacert {shlex.quote(tls)}" if tls is not None else ""
    return f"curl -s{trust} {url}/completions -H 'Content-Type: application/json'{key} -d '{body}'"
