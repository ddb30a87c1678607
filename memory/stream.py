"""One request's stream: checks what the engine sends and turns it into orders for the link's thread."""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from memory.frames import MAX_CONTROL_BYTES, Kind
from memory.messages import LeaseGrant
from memory.pages import PagePool
from memory.transport import KVStream

logger = logging.getLogger(__name__)

MAX_REASON_BYTES = 500


@dataclass(frozen=True, slots=True)
class Order:
    """Something a stream asks its link to send."""

    stream: "Stream"
    kind: Kind
    layer_idx: int = 0
    first_slot: int = 0
    pages: tuple[int, ...] = ()  # the sender's
    payload: bytes = b""
    ready: torch.cuda.Event | None = None  # when the pages are final


class Stream(KVStream):
    """See ``KVStream``. The link that ``put`` queues orders on calls ``finish``."""

    def __init__(
        self, grant: LeaseGrant, pool: PagePool, *, on_acked: Callable[[], None], on_failed: Callable[[str], None]
    ) -> None:
        self.grant = grant
        self.key = b""  # the link sets it when it knows the connection's nonce
        self.answer_by = float("inf")  # when the receiver must have answered
        self.is_greeted = False  # whether the receiver has accepted its HELLO
        self.put: Callable[[Order], bool] | None = None
        self._pool = pool
        self._on_acked = on_acked
        self._on_failed = on_failed
        last_idx = max(grant.page_idxs, default=-1)  # past the tokens' pages, where cores travel too
        self._end = max(pool.layout.num_pages(grant.num_tokens), last_idx + 1)
        self._slots = {page_idx: slot for slot, page_idx in enumerate(grant.page_idxs)}
        self._lock = threading.Lock()
        self._open = True

    @property
    def is_open(self) -> bool:
        """Whether neither an acknowledgement, a failure nor an abort has ended it."""
        return self._open

    def send(self, layer_idx: int, page_idxs: Sequence[int], pages: Sequence[int]) -> None:
        self._check(layer_idx, page_idxs, pages)
        runs: list[tuple[int, list[int]]] = []  # first slot, and the pages of it and the following ones
        next_slot = -1
        for page_idx, page in zip(page_idxs, pages, strict=True):
            slot = self._slots.get(page_idx)
            if slot is None:
                continue
            if slot != next_slot:
                runs.append((slot, []))
            runs[-1][1].append(page)
            next_slot = slot + 1
        ready = self._event() if runs else None
        for first_slot, wanted in runs:
            self._order(Order(self, Kind.DATA, layer_idx, first_slot, tuple(wanted), ready=ready))

    def commit(self, payload: bytes) -> None:
        if len(payload) > MAX_CONTROL_BYTES:
            raise ValueError(f"a commit payload of {len(payload)} bytes; at most {MAX_CONTROL_BYTES} are allowed")
        self._order(Order(self, Kind.COMMIT, payload=payload))

    def abort(self, reason: str) -> None:
        if self.end():
            self._order(Order(self, Kind.ABORT, payload=reason.encode()[:MAX_REASON_BYTES]))

    def end(self) -> bool:
        """End the stream; false if it had ended."""
        with self._lock:
            was_open, self._open = self._open, False
        return was_open

    def finish(self, failure: str | None = None) -> None:
        """End the stream and call back, unless it had ended."""
        if not self.end():
            return
        try:
            if failure is None:
                self._on_acked()
            else:
                self._on_failed(failure)
        except Exception:  # the engine's defect: the link goes on serving other streams
            logger.exception("callback of request %s", self.grant.request_id)

    def _check(self, layer_idx: int, page_idxs: Sequence[int], pages: Sequence[int]) -> None:
        """Raise ``ValueError`` if this cannot be sent. ``min`` and ``max`` keep it cheap: every layer comes by here."""
        layout, num_pages = self._pool.layout, self._pool.num_pages
        if not 0 <= layer_idx < layout.num_layers:
            raise ValueError(f"layer {layer_idx} is not in the pool; allowed: 0..{layout.num_layers - 1}")
        if len(page_idxs) != len(pages):
            raise ValueError(f"page_idxs has {len(page_idxs)} entries for {len(pages)} pages; allowed: one for each")
        if not pages:
            return
        if min(pages) < 0 or max(pages) >= num_pages:
            raise ValueError(f"pages {list(pages)} are not in the pool; allowed: 0..{num_pages - 1}")
        if max(page_idxs) >= self._end:
            raise ValueError(f"page {max(page_idxs)} of the sequence is not in the grant, which ends at {self._end}")

    def _order(self, order: Order) -> None:
        assert self.put is not None
        self.put(order)  # false if the link has ended: then it has failed this stream, or will in a moment

    def _event(self) -> torch.cuda.Event | None:
        if not self._pool.storage.is_cuda:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._pool.storage.device))
        return event
