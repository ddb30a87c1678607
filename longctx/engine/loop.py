"""The thread that owns an engine: it steps while there is work and runs what others ask for between two steps."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

import torch

from longctx.engine.engine import Engine
from longctx.errors import WorkerLostError
from longctx.messages import OutputDelta
from parallel.carrier import ExchangeError

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

IDLE_WAIT_S = 1.0  # longest wait for a call; calls wake the thread at once


class EngineLoop:
    """Runs ``engine.step`` on a thread of its own, from construction until ``close``.

    Args:
        engine: touched by nobody else from now on, but through ``call``.
        on_deltas: gets each step's deltas on the engine's thread; it must be quick.
        name: of the thread.
        on_broken: called on the engine's thread, with the reason, once the engine is of no more use: a rank of it is
            lost, or something failed outside a step. Then what was in flight and who called gets an error, and the
            thread ends.
    """

    def __init__(
        self,
        engine: Engine,
        on_deltas: Callable[[list[OutputDelta]], None],
        *,
        name: str = "engine",
        on_broken: Callable[[str], None] | None = None,
    ) -> None:
        self.engine = engine
        self._on_deltas = on_deltas
        self._on_broken = on_broken
        self._calls: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._is_closing = False
        self._broken = ""  # why
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Run ``function`` on the engine's thread before its next step; the future has its result or exception.

        Deltas that ``Engine.attach`` returns are the function's result: they do not go to ``on_deltas``.

        Raises ``RuntimeError`` after ``close``; it or the future ``WorkerLostError`` once the engine is broken.
        """
        future: Future[R] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                self._check()
                result = function(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 - handed to whoever waits for it
                future.set_exception(error)
            else:
                future.set_result(result)

        with self._wake:
            self._check()
            if self._is_closing:
                raise RuntimeError("the engine loop is closed")
            self._calls.append(run)
            self._wake.notify()
        return future

    def close(self, timeout: float = 30.0) -> None:
        """Stop after the step in progress; what is in flight ends with finish_reason "abort".

        Raises ``TimeoutError`` if the step takes longer than ``timeout`` seconds.
        """
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"the engine did not stop within {timeout:g} s")

    def _run(self) -> None:
        torch.set_num_threads(torch.get_num_threads())  # OpenMP's own count belongs to a thread: oneDNN asks for that
        try:
            while self._run_calls():
                if self.engine.has_work:
                    self._deliver(self._step())
            self._deliver(self.engine.fail_all("the engine was stopped", "abort"))
            self.engine.close()
        except Exception as error:  # a thread that just ended would leave everybody waiting
            logger.exception("the engine cannot go on")
            self._break(str(error) or type(error).__name__)

    def _break(self, reason: str) -> None:
        """Nothing is taken any more, and what waits is told so."""
        with self._wake:
            self._is_closing, self._broken = True, reason
            calls = list(self._calls)
            self._calls.clear()
        try:
            if self._on_broken is not None:
                self._on_broken(reason)
        finally:
            for run in calls:
                run()
            self._deliver(self.engine.fail_all(f"the engine failed: {reason}"))
            self.engine.close()

    def _check(self) -> None:
        if self._broken:
            raise WorkerLostError(f"the engine failed: {self._broken}")

    def _run_calls(self) -> bool:
        """Run pending calls, waiting for one while there is nothing to compute; False once the loop is closed."""
        while True:
            with self._wake:
                if not self._calls and not self._is_closing and not self.engine.has_work:
                    self._wake.wait(IDLE_WAIT_S)
                calls = list(self._calls)
                self._calls.clear()
                is_closing = self._is_closing
            for run in calls:
                run()
            if is_closing or self.engine.has_work:
                return not is_closing
            self.engine.keep_alive()

    def _step(self) -> list[OutputDelta]:
        try:
            return self.engine.step()
        except ExchangeError:  # the ranks may be anywhere in the step: the engine is of no more use
            raise
        except Exception as error:  # requests in flight get it; the engine goes on with none
            logger.exception("a step failed; ending the requests in flight")
            # Everybody in flight is told, and the text may be of one request alone.
            return self.engine.fail_all(f"the engine failed with {type(error).__name__}; its log says more")

    def _deliver(self, deltas: list[OutputDelta]) -> None:
        if not deltas:
            return
        try:
            self._on_deltas(deltas)
        except Exception:  # a consumer's mistake must not stop everybody's generation
            logger.exception("the consumer of deltas failed")
