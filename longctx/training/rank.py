"""One rank in a process of its own, whoever started it: its environment, its body, and what becomes of it."""

import os
import traceback

from longctx.errors import LongctxError, WorkerLostError
from longctx.threads import THREAD_ENV
from longctx.training.place import RankOrder, RankOutcome
from parallel.registry import load


def run_rank(order: RankOrder) -> RankOutcome:
    """Run the rank's body. Torch must not be loaded yet: it reads some of the environment when it is."""
    _set_environment(order)
    try:
        return RankOutcome(report=load(order.body)(order.config, order.place))
    except WorkerLostError:  # of a peer: the gang may go on without the one that is lost
        return RankOutcome(failure=traceback.format_exc())
    except LongctxError as error:
        return RankOutcome(error=error)
    except Exception:  # noqa: BLE001 - whatever it is, the launcher decides
        return RankOutcome(failure=traceback.format_exc())


def _set_environment(order: RankOrder) -> None:
    """What torch and DeepSpeed look for there; what the user has set of threads and interfaces stays."""
    place = order.place
    cores = len(os.sched_getaffinity(0))
    num_threads = order.config.train.num_threads or max(1, cores // place.local_world_size)
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    os.environ |= {
        "RANK": str(place.global_rank),
        "WORLD_SIZE": str(place.world_size),
        "LOCAL_RANK": "0",  # DeepSpeed takes it for the index of the GPU, and a rank sees one
        "LOCAL_WORLD_SIZE": str(place.local_world_size),
        "MASTER_ADDR": place.master_address,
        "MASTER_PORT": str(place.master_port),
    }
    for name, value in THREAD_ENV.items() if place.local_world_size > 1 else ():
        os.environ.setdefault(name, value)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
