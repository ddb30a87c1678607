"""CCA attention in the engine: what a request may ask for, how long contexts can be, and the parts that differ."""

from collections.abc import Callable

from longctx.attention.config import choose_sizes
from longctx.engine.config import EngineConfig
from longctx.engine.core_rows import CoreRows
from longctx.engine.core_runner import CoreRunner
from longctx.engine.core_scheduler import CoreScheduler
from longctx.engine.method import count_step_tokens
from longctx.engine.rows import DecodeRows
from longctx.engine.runner import Runner
from longctx.engine.scheduler import Scheduler
from longctx.errors import RequestError
from longctx.messages import GenerationRequest
from longctx.models.attention_spec import CCASpec
from longctx.models.packed import PackedDecoder
from memory.core_pages import CoreCapacity, CoreSizes
from memory.lower_pages import LowerPages
from memory.pages import PageAllocator, PagePool
from memory.prefix_cache import PrefixCache

CHUNK_SHARE = 4  # a chunk takes at most 1/4 of the pool


class CoreMethod:
    """The ``EngineMethod`` of CCA.

    Args:
        spec: sizes of requests that name none.
        decoder: the model.
        cache: of a pool in this process; it is turned off.
        config: of the engine.
        max_context: tokens that the model takes.
        below: where pages are kept that leave the window, for groups that are fetched; None: none are.
        make_runner: what computes the steps; None: this process alone.
    """

    def __init__(
        self,
        spec: CCASpec,
        decoder: PackedDecoder,
        cache: PrefixCache,
        *,
        config: EngineConfig,
        max_context: int,
        below: LowerPages | None = None,
        make_runner: Callable[[CoreRows], Runner] | None = None,
    ) -> None:
        pool, layout = cache.pool, cache.pool.layout
        assert isinstance(pool, PagePool)
        cache.enabled = False
        self._spec, self._num_pages, self._model_context = spec, pool.num_pages, max_context
        if below is not None:
            self._model_context = min(max_context, below.num_pages * layout.page_size)
        most = min(config.max_batch_tokens, pool.num_pages * layout.page_size // CHUNK_SHARE)
        core_stride = count_stride(fetches=below is not None)
        self._capacity = _make_capacity(layout.page_size, most, core_stride)
        self.max_context = self._count_context(CoreSizes(spec.group_size, spec.window))
        rows = CoreRows(
            num_rows=2 * config.max_sequences,
            num_tokens=count_step_tokens(config, layout.page_size),
            num_table_pages=min(layout.num_pages(max_context), pool.num_pages),  # whatever sizes are asked for
            page_size=layout.page_size,
            core_stride=core_stride,
        )
        self.rows: DecodeRows = rows
        self.scheduler: Scheduler = CoreScheduler(
            cache,
            rows,
            max_batch_tokens=config.max_batch_tokens,
            max_sequences=config.max_sequences,
            mixed_share=config.mixed_share,
            capacity=self._capacity,
            sizes_of=self.sizes_of,
            below=below,
        )
        self.ships_kv = below is None or below.ships
        self.shipped: PageAllocator = below or pool
        self.runner: Runner
        if make_runner is not None:
            self.runner = make_runner(rows)
        else:
            self.runner = CoreRunner(decoder, pool, rows=rows, device=decoder.device)

    def sizes_of(self, request: GenerationRequest) -> CoreSizes:
        """Groups and window of a request; raises ``RequestError`` for what it must not ask for."""
        options = request.sampling.attention
        if options is None:
            return CoreSizes(self._spec.group_size, self._spec.window)
        try:
            return CoreSizes(*choose_sizes(self._spec, options.group_size, options.window))
        except ValueError as error:
            raise RequestError(str(error), param="attention") from None

    def context_of(self, request: GenerationRequest) -> int:
        """Tokens of prompt and output together that fit the model and the pool; raises as ``sizes_of``."""
        return self._count_context(self.sizes_of(request))

    def _count_context(self, sizes: CoreSizes) -> int:
        return self._capacity.count_tokens(sizes, self._num_pages, at_most=self._model_context)


def count_stride(*, fetches: bool) -> int:
    """Pages that a page of cores takes: where groups are fetched, one of bounds follows it."""
    return 2 if fetches else 1


def count_context_pages(spec: CCASpec, config: EngineConfig, page_size: int, max_context: int, *, fetches: bool) -> int:
    """Pages of a sequence of ``max_context`` tokens in a pool where chunks are whole steps."""
    capacity = _make_capacity(page_size, config.max_batch_tokens, count_stride(fetches=fetches))
    return capacity.count_pages(CoreSizes(spec.group_size, spec.window), max_context)


def _make_capacity(page_size: int, chunk_size: int, core_stride: int) -> CoreCapacity:
    """With chunks of whole pages, at least one."""
    return CoreCapacity(page_size, max(page_size, chunk_size - chunk_size % page_size), core_stride)
