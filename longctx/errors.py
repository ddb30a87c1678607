"""Errors that users and peers see. Each says what is wrong and what is allowed."""


class LongctxError(Exception):
    """Base of the project's own errors."""


class ConfigError(LongctxError, ValueError):
    """A configuration key or value is wrong; the text names the key, the value and what is allowed."""


class CheckpointError(LongctxError, ValueError):
    """A model folder cannot be served; the text names the folder, the file or field, and the reason."""


class TrainingError(LongctxError):
    """Training cannot go on, and would fail again: the text says in which step, on which rows, and what is left."""


class DataError(LongctxError, ValueError):
    """A row of data cannot be trained on; the text names the file, the line and the reason."""


class RequestError(LongctxError, ValueError):
    """A request cannot be served as it stands.

    Args:
        message: what is wrong and what is allowed.
        param: the request field at fault (``"prompt"``, ``"temperature"``), if one is.
        code: a short machine-readable code (``"context_length_exceeded"``), if there is a standard one.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_request_error, (str(self), self.param, self.code)


class QueueFullError(LongctxError):
    """The queue is full; try again after ``retry_after_s`` seconds."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class WorkerDrainedError(LongctxError):
    """A worker that takes nothing new gives a request up; another one goes on with it."""


class WorkerLostError(LongctxError):
    """A worker died or stopped answering while it held the request."""


class WorkerSilentError(WorkerLostError):
    """It stopped answering: it froze, or cannot be reached."""


def _rebuild_request_error(message: str, param: str | None, code: str | None) -> RequestError:
    return RequestError(message, param=param, code=code)
