"""How a process that somebody else started logs to that one's terminal: lines with a mark, named by who says them.

Its other output (a library's talk, progress bars) has no mark, by which whoever started it tells them apart.
"""

import logging
import sys

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
MARK = "longctx| "  # begins each line of a record


class MarkedFormatter(logging.Formatter):
    """Marks every line of a record, tracebacks included; ``speaker`` may be empty."""

    def __init__(self, speaker: str) -> None:
        name = f"{speaker.replace('%', '%%')} %(name)s" if speaker else "%(name)s"
        super().__init__(LOG_FORMAT.replace("%(name)s", name))

    def format(self, record: logging.LogRecord) -> str:
        """See ``logging.Formatter``."""
        return "\n".join(MARK + line for line in super().format(record).splitlines())


def log_to_terminal(speaker: str, level: int) -> None:
    """Send what is logged from ``level`` on to the terminal, as said by ``speaker``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(MarkedFormatter(speaker))
    logging.basicConfig(level=level, handlers=[handler], force=True)
