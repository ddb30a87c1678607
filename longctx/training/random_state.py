"""Random numbers of a computation that is done again: the same dropout both times."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class RandomState:
    """The generators' state now, on the CPU and on ``device``."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Go on from this state, and afterwards from where one was."""
        devices = [] if self._cuda is None else [self._device]
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(self._cpu)
            if self._cuda is not None:
                torch.cuda.set_rng_state(self._cuda, self._device)
            yield
