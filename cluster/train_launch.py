"""The ranks of a training on Ray: the connection, the gang's attempts, and the end of both."""

import threading
import time
from typing import Any

from cluster.config import RayConfig
from cluster.local_ray import RaySession
from longctx.training.config import TrainConfig
from longctx.training.gang import supervise
from longctx.training.place import BODY

LAST_LINES_S = 1.0  # what rank 0 logged last is still on its way to us


def launch_on_ray(config: TrainConfig, *, stop: threading.Event, body: str = BODY) -> dict[str, Any]:
    """Run all ranks in ``cluster.address``'s Ray, or one of our own; returns rank 0's report.

    Args, errors: as ``longctx.training.launch.launch_locally``; and ``LongctxError`` if there is no room for the ranks.
    """
    world_size = config.parallel.dp_degree * config.parallel.sp_degree
    ray_config = RayConfig(address=config.cluster.address)
    session = RaySession(ray_config, shares_cores=world_size > 1, address_key="cluster.address")
    try:
        session.start()
        from cluster.train_gang import TrainGang  # imports ray, which reads what the session sets

        gang = TrainGang(config, session, stop, body)
        report = supervise(gang.attempt, max_restarts=config.cluster.max_restarts, stop=stop)
        time.sleep(LAST_LINES_S)
        return report
    except KeyboardInterrupt:
        session.kill()
        raise
    finally:
        session.stop()
