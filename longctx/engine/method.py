"""The parts of an engine that an attention method has of its own, and those of dense attention."""

from collections.abc import Callable
from typing import Protocol

from longctx.engine.config import EngineConfig
from longctx.engine.rows import DecodeRows
from longctx.engine.runner import Runner, make_local_runner
from longctx.engine.scheduler import Scheduler
from longctx.engine.sequence import INDEPENDENT, RopeLengths
from longctx.errors import RequestError
from longctx.messages import GenerationRequest
from longctx.models.packed import PackedDecoder
from memory.pages import PageAllocator, PagePool
from memory.prefix_cache import PrefixCache


class EngineMethod(Protocol):
    """What the engine needs of a method."""

    rows: DecodeRows
    scheduler: Scheduler
    runner: Runner
    max_context: int  # tokens of prompt and output together that fit the model and the pool
    ships_kv: bool  # whether prompts may be computed elsewhere than they are continued
    shipped: PageAllocator  # numbers what travels between workers, and is told of it

    def context_of(self, request: GenerationRequest) -> int:
        """``max_context`` for one request; raises ``RequestError`` for attention that it cannot have."""
        ...


class DenseMethod:
    """Every query sees every earlier token, or its layer's window of them.

    Args:
        decoder: the model.
        cache: of the pool.
        config: of the engine.
        max_context: tokens that the model takes.
        make_runner: what computes the steps; None: this process alone.
    """

    ships_kv = True

    def __init__(
        self,
        decoder: PackedDecoder,
        cache: PrefixCache,
        *,
        config: EngineConfig,
        max_context: int,
        make_runner: Callable[[DecodeRows], Runner] | None = None,
    ) -> None:
        self.shipped = pool = cache.pool
        page_size = pool.layout.page_size
        self.rows = DecodeRows(
            num_rows=2 * config.max_sequences,
            num_tokens=count_step_tokens(config, page_size),
            num_table_pages=pool.layout.num_pages(min(max_context, pool.num_pages * page_size)),
            page_size=page_size,
        )
        self.scheduler = Scheduler(
            cache,
            self.rows,
            max_batch_tokens=config.max_batch_tokens,
            max_sequences=config.max_sequences,
            mixed_share=config.mixed_share,
            rope_lengths=_rope_lengths(decoder),
        )
        if make_runner is not None:
            self.runner: Runner = make_runner(self.rows)
        else:
            assert isinstance(pool, PagePool)
            self.runner = make_local_runner(decoder, pool, self.rows, config=config, max_context=max_context)
        self.max_context = min(max_context, cache.num_available * page_size)

    def context_of(self, request: GenerationRequest) -> int:
        """As for every other request."""
        if request.sampling.attention is not None:
            raise RequestError(
                "attention is not allowed: this model is not served with CCA attention", param="attention"
            )
        return self.max_context


def count_step_tokens(config: EngineConfig, page_size: int) -> int:
    """Tokens of a step at most, prompts and decode together."""
    return config.max_sequences + max(config.max_batch_tokens, page_size)


def _rope_lengths(decoder: PackedDecoder) -> RopeLengths:
    rotary = decoder.rotary
    if not decoder.backend.depends_on_length:
        return INDEPENDENT
    return RopeLengths(rotary.length_threshold, rotary.restart_length, is_binary=rotary.rope_type == "longrope")
