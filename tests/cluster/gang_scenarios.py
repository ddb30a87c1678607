"""Trainings on one Ray, one after the other: ``python -m tests.cluster.gang_scenarios FOLDER``.

Prints what became of each as JSON, one a line.
"""

import json
import logging
import sys
import threading
from pathlib import Path

from cluster.config import RayConfig
from cluster.local_ray import RaySession
from longctx.errors import LongctxError
from longctx.training.gang import supervise
from tests.longctx.gang_body import BODY, make_config

SHARED = {"cpus_per_rank": 0.5}
SCENARIOS = {
    "meet": {"sp_degree": 2, "acts": [{"rank": rank, "act": act} for rank in range(2) for act in ("log", "add")]},
    "lost": {
        "sp_degree": 2,
        "acts": [{"rank": 1, "act": "kill"}, {"rank": 0, "act": "hang"}, {"rank": 0, "restart": 1, "act": "fail"}],
    },
    "lost too often": {"acts": [{"rank": 0, "act": "kill"}], "max_restarts": 0},
    "refused": {"sp_degree": 2, "acts": [{"rank": 0, "act": "fail"}, {"rank": 1, "act": "refuse"}]},
    "too many": {"sp_degree": 3, "dp_degree": 2, "cpus_per_rank": 1.0},
    "no gpus": {"sp_degree": 2, "gpus_per_rank": 1.0},
    "no nodes": {"sp_degree": 2, "strategy": "STRICT_SPREAD"},
}


def main(folder: Path) -> None:
    """Run them all."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(message)s")
    session = RaySession(RayConfig(num_cpus=2))
    try:
        session.start()
        from cluster.train_gang import TrainGang

        for name, options in SCENARIOS.items():
            config = make_config(folder / name, **(SHARED | options))
            stop = threading.Event()
            gang = TrainGang(config, session, stop, BODY)
            try:
                answer = supervise(gang.attempt, max_restarts=config.cluster.max_restarts, stop=stop)
            except LongctxError as error:
                answer = {"error": str(error), "kind": type(error).__name__}
            sys.stdout.write(json.dumps(answer) + "\n")
    finally:
        session.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
