"""What Ray's processes print, on the terminal of the command that started them: our own lines alone.

Ray brings everything that its processes print. Of that, the terminal gets lines with our mark; Ray's and Serve's own
talk, progress bars and the like stay in Ray's log files. Uses two private names of Ray, which has no public way to
replace how it prints; where they are missing, Ray prints as it likes.
"""

import sys
from typing import Any

from longctx.terminal_log import MARK

RAY_HANDLER = "ray_print_logs"


def show_workers() -> None:
    """In the driver, once it is connected: show marked lines, and nothing else of what Ray's processes print."""
    from ray._private import ray_logging, worker

    dispatcher = getattr(ray_logging, "global_worker_stdstream_dispatcher", None)
    if dispatcher is None or not hasattr(worker, "_worker_logs_enabled"):
        return
    dispatcher.remove_handler(RAY_HANDLER)
    dispatcher.add_handler(RAY_HANDLER, _show)  # by this name Ray removes it when it disconnects
    worker._worker_logs_enabled = False  # what its daemons say of our workers, the router says better


def _show(data: dict[str, Any]) -> None:
    for line in data.get("lines", ()):
        if line.startswith(MARK):
            sys.stderr.write(line.removeprefix(MARK) + "\n")
