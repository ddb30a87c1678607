"""The process of one rank: ``python -m longctx.training.rank_process FD``, as ``longctx/training/launch.py`` starts it.

It reads its order from standard input and writes its outcome to file descriptor FD. Standard input stays open as long
as the launcher lives: at its end the rank, and whatever it has started, ends too, also after a SIGKILL of the launcher.
"""

import logging
import os
import pickle
import signal
import sys
import threading

from longctx.terminal_log import LOG_FORMAT, log_to_terminal
from longctx.training.place import RankOrder
from longctx.training.rank import run_rank
from longctx.training.stop import stop_on_signals


def main() -> int:
    """Run the rank; 0 once its outcome is written, whatever that is."""
    stop_on_signals()
    order: RankOrder = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_follow_launcher, daemon=True).start()
    if order.place.global_rank == 0:
        logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, stream=sys.stderr)
    else:
        log_to_terminal(f"rank {order.place.global_rank}", logging.WARNING)
    outcome = pickle.dumps(run_rank(order))
    with open(int(sys.argv[1]), "wb") as file:
        file.write(outcome)
    return 0


def _follow_launcher() -> None:
    os.read(sys.stdin.fileno(), 1)  # nothing comes; not through the buffer, whose lock would keep us from ending
    os.killpg(0, signal.SIGKILL)  # the group is this rank's own


if __name__ == "__main__":
    sys.exit(main())
