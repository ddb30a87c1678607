"""How the engine hands a prompt's KV out while it computes it (prefill worker), and takes it in (decode worker)."""

from dataclasses import dataclass
from typing import Protocol

from longctx.messages import FirstTokens


class KVExport(Protocol):
    """Receives one request's KV during prefill. Called on the engine's thread: implementations only enqueue.

    The engine keeps the request's pages until ``Engine.export_done(request_id)``.
    """

    def on_layer(self, layer_idx: int, first_page_idx: int, pages: list[int]) -> None:
        """This layer of the sequence's pages ``first_page_idx...`` (pool page ids ``pages``) is final."""

    def on_prefilled(self, first: FirstTokens) -> None:
        """Every layer of every page was announced; ``first`` is what the prompt's last position sampled."""

    def on_failed(self, reason: str) -> None:
        """The prefill was cancelled or failed; nothing more will come."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """Pages a decode engine holds for a prompt whose KV will arrive."""

    request_id: str
    pages: tuple[int, ...]  # pages to be filled, in sequence order
    first_page_idx: int  # index in the sequence of pages[0]; earlier pages came from this engine's prefix cache
    num_cached_tokens: int  # tokens in those earlier pages
