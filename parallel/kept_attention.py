"""Attention results that outlive a checkpointed computation: when that is done again, they are taken back.

Computing a checkpointed layer again would run the exchange of its attention a second time, and the attention with it.
With its output and log-sum-exp kept, one tensor of the hidden size a layer, neither is needed: queries, keys and values
are computed again, the rest is there (DISTFLASHATTN, arXiv 2310.03294, section 3.3). The backward then reads the output
as it was rounded, as FlashAttention's does (arXiv 2307.08691); without a checkpoint ours reads it unrounded.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch

Pack = Callable[[torch.Tensor], Any]
Unpack = Callable[[Any], torch.Tensor]


class KeptAttention:
    """The results of the attentions of one checkpointed computation, in their order.

    Args:
        pack, unpack: what is done with a tensor that is kept, and how it comes back; None: it stays as it is.
    """

    def __init__(self, pack: Pack | None = None, unpack: Unpack | None = None) -> None:
        self._pack, self._unpack = pack, unpack
        self._results: list[tuple[Any, Any, torch.Tensor]] = []
        self._next = 0
        self.replays = False

    def recording(self) -> "_Phase":
        """While it is computed first: what attention yields is kept."""
        return _Phase(self, replays=False)

    def replaying(self) -> "_Phase":
        """While it is computed again: attention yields what was kept. Can be entered more than once."""
        return _Phase(self, replays=True)

    def start(self, *, replays: bool) -> None:
        """Begin with the first attention."""
        self.replays, self._next = replays, 0

    def keep(self, run: Any, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Add the next attention: how it was run, its output and log-sum-exp."""
        out = out.detach()  # without its node, which holds this computation
        self._results.append((run, self._pack(out) if self._pack else out, lse.detach()))

    def take(self) -> tuple[Any, tuple[torch.Tensor, torch.Tensor]]:
        """The next attention: how it was run, and new views of its output and log-sum-exp."""
        run, out, lse = self._results[self._next]
        self._next += 1
        return run, ((self._unpack(out) if self._unpack else out).detach(), lse.detach())


class _Phase:
    """A context that can be entered again."""

    def __init__(self, kept: KeptAttention, *, replays: bool) -> None:
        self._kept, self._replays = kept, replays

    def __enter__(self) -> None:
        self._kept.start(replays=self._replays)
        self._before = _current.set(self._kept)

    def __exit__(self, *_: object) -> None:
        _current.reset(self._before)


_current: ContextVar[KeptAttention | None] = ContextVar("kept_attention", default=None)


def current_kept_attention() -> KeptAttention | None:
    """Where the attention that is called now keeps its result or takes it from."""
    return _current.get()
