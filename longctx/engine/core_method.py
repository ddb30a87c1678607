"""CCA attention in the engine: what a request may ask for, how long contexts can be, and the parts that differ."""

from longctx.attention.config import choose_sizes
from longctx.engine.config import EngineConfig
from longctx.engine.core_rows import CoreRows
from longctx.engine.core_runner import CoreRunner
from longctx.engine.core_scheduler import CoreScheduler
from longctx.errors import RequestError
from longctx.messages import GenerationRequest
from longctx.models.attention_spec import CCASpec
from longctx.models.packed import PackedDecoder
from memory.core_pages import CoreCapacity, CoreSizes
from memory.pages import PagePool
from memory.prefix_cache import PrefixCache

CHUNK_SHARE = 4  # a chunk takes at most 1/4 of the pool


class CoreMethod:
    """What an engine asks about CCA.

    Args:
        spec: sizes of requests that name none.
        pool: whose pages hold the sequences.
        config: of the engine.
        model_context: tokens that the model takes.
    """

    def __init__(self, spec: CCASpec, pool: PagePool, *, config: EngineConfig, model_context: int) -> None:
        self._spec, self._pool, self._config, self._model_context = spec, pool, config, model_context
        self._capacity = make_capacity(config, pool.layout.page_size, pool.num_pages)
        self.max_context = self._count_context(CoreSizes(spec.group_size, spec.window))

    def sizes_of(self, request: GenerationRequest) -> CoreSizes:
        """Groups and window of a request; raises ``RequestError`` for what it must not ask for."""
        options = request.sampling.attention
        if options is None:
            return CoreSizes(self._spec.group_size, self._spec.window)
        try:
            sizes = choose_sizes(self._spec, options.group_size, options.window)
        except ValueError as error:
            raise RequestError(str(error), param="attention") from None
        return CoreSizes(*sizes)

    def context_of(self, request: GenerationRequest) -> int:
        """Tokens of prompt and output together that fit the model and the pool; raises as ``sizes_of``."""
        return self._count_context(self.sizes_of(request))

    def make_rows(self, *, num_rows: int, num_tokens: int) -> CoreRows:
        """Rows for the longest tables that any sizes need."""
        layout = self._pool.layout
        num_table_pages = min(layout.num_pages(self._model_context), self._pool.num_pages)
        return CoreRows(
            num_rows=num_rows, num_tokens=num_tokens, num_table_pages=num_table_pages, page_size=layout.page_size
        )

    def make_scheduler(self, cache: PrefixCache, rows: CoreRows) -> CoreScheduler:
        """The scheduler of the pool's pages."""
        return CoreScheduler(
            cache,
            rows,
            max_batch_tokens=self._config.max_batch_tokens,
            max_sequences=self._config.max_sequences,
            capacity=self._capacity,
            sizes_of=self.sizes_of,
        )

    def make_runner(self, decoder: PackedDecoder, rows: CoreRows) -> CoreRunner:
        """The runner of the pool's pages."""
        return CoreRunner(decoder, self._pool, rows=rows, device=decoder.device)

    def _count_context(self, sizes: CoreSizes) -> int:
        return self._capacity.count_tokens(sizes, self._pool.num_pages, at_most=self._model_context)


def count_context_pages(spec: CCASpec, config: EngineConfig, page_size: int, max_context: int) -> int:
    """Pages of a sequence of ``max_context`` tokens in a pool where chunks are whole steps."""
    capacity = CoreCapacity(page_size, max(page_size, config.max_batch_tokens - config.max_batch_tokens % page_size))
    return capacity.count_pages(CoreSizes(spec.group_size, spec.window), max_context)


def make_capacity(config: EngineConfig, page_size: int, num_pages: int) -> CoreCapacity:
    """What a pool of ``num_pages`` takes: its chunks are smaller than a step where it is small."""
    most = min(config.max_batch_tokens, num_pages * page_size // CHUNK_SHARE)
    return CoreCapacity(page_size, max(page_size, most - most % page_size))
