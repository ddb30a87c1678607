"""What workers log, on the terminal of ``longctx serve``: our own lines alone, one per line, named by who says them.

Ray brings everything that its processes print. Of that, the terminal gets lines with our mark; Ray's and Serve's own
talk, progress bars and the like stay in Ray's log files. Uses two private names of Ray, which has no public way to
replace how it prints; where they are missing, Ray prints as it likes.
"""

import logging
import sys
from typing import Any

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
MARK = "longctx| "  # begins each line of a record
RAY_HANDLER = "ray_print_logs"


class MarkedFormatter(logging.Formatter):
    """Marks every line of a record, tracebacks included."""

    def __init__(self, speaker: str) -> None:
        super().__init__(LOG_FORMAT.replace("%(name)s", f"{speaker.replace('%', '%%')} %(name)s"))

    def format(self, record: logging.LogRecord) -> str:
        """See ``logging.Formatter``."""
        return "\n".join(MARK + line for line in super().format(record).splitlines())


def log_to_terminal(speaker: str, level: int) -> None:
    """In a process of Ray: send what is logged from ``level`` on to the terminal, as said by ``speaker``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(MarkedFormatter(speaker))
    logging.basicConfig(level=level, handlers=[handler], force=True)


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
