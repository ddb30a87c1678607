"""A gang of ranks that live and fall together: what their ends mean, and when they are started again.

Ranks in lockstep cannot lose one and go on. A lost one ends the others, and the gang starts anew from its last
checkpoint; an error that would only come again ends the command.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

from longctx.errors import LongctxError, WorkerLostError
from longctx.training.place import RankOutcome

logger = logging.getLogger(__name__)

# After one rank ended badly, what the others say of it is waited for so long: a lost peer makes them fail, too, and
# whoever comes first need not be the one who knows.
GRACE_S = 3.0


class StoppedError(LongctxError):
    """A gang was asked to end before it had begun."""


def supervise(attempt: Callable[[int], dict[str, Any]], *, max_restarts: int, stop: threading.Event) -> dict[str, Any]:
    """Rank 0's report, from the first attempt that loses no rank.

    Args:
        attempt: runs the gang; gets how often it was started before, raises ``WorkerLostError`` to be started again.
        max_restarts: how often it is.
        stop: set once the gang is asked to end; it is not started again then.
    """
    restart = 0
    while True:
        try:
            return attempt(restart)
        except WorkerLostError as error:
            if stop.is_set():
                raise
            if restart == max_restarts:
                told = f"after {restart} restarts (cluster.max_restarts): " if restart else ""
                raise LongctxError(f"{told}{error}") from None
            restart += 1
            logger.warning(
                "%s; starting all ranks again from the last checkpoint (%d of %d)", error, restart, max_restarts
            )


def settle(outcomes: Mapping[int, RankOutcome], lost: Mapping[int, str]) -> dict[str, Any]:
    """Rank 0's report, if all ranks have one.

    Args:
        outcomes: by rank, of those who said how they ended.
        lost: by rank, why one did not.

    Raises:
        WorkerLostError: if a rank was lost, or failed in a way that may not come again.
        LongctxError: what a rank raised of the project's own.
    """
    for _, outcome in sorted(outcomes.items()):
        if outcome.error is not None:
            raise outcome.error
    if lost:
        raise WorkerLostError("; ".join(f"rank {rank} {reason}" for rank, reason in sorted(lost.items())))
    for rank, outcome in sorted(outcomes.items()):
        if outcome.failure:
            raise WorkerLostError(f"rank {rank} failed: {outcome.failure.rstrip()}")
    report = outcomes[0].report
    assert report is not None
    return report


def is_bad(outcome: RankOutcome | None) -> bool:
    """Whether the gang cannot go on after a rank ended so; None: without a word."""
    return outcome is None or outcome.report is None
