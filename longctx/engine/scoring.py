"""Log probabilities of a given text: what perplexity is made of.

The text is computed as a prompt is, in chunks over pages of the pool, except that every row of a chunk reaches the
output matrix. Logits are made in slices of rows: ``[tokens, vocab_size]`` never exists as a whole. The pages are the
scorer's own, neither shared with the prefix cache nor known to the scheduler, and are free again afterwards. Where
pages follow a window (CCA), the scheduler has to know: the text is then the prompt of a request, alone in the engine.

Shape legend: T tokens of a chunk, C hidden size, S rows of a slice, V vocabulary.
"""

import uuid
from collections.abc import Callable
from dataclasses import replace

import torch

from longctx.attention.batch import PackedBatch
from longctx.engine.engine import Engine
from longctx.engine.runner import ModelRunner
from longctx.engine.sequence import Int64Array
from longctx.errors import QueueFullError
from longctx.messages import GenerationRequest, SamplingParams
from longctx.models.packed import PackedDecoder
from memory.pages import PagePool
from memory.prefix_cache import PrefixCache

SLICE_BYTES = 64 * 2**20  # of float32 logits at one time


@torch.inference_mode()
def score_tokens(
    decoder: PackedDecoder,
    cache: PrefixCache,
    pool: PagePool,
    token_ids: Int64Array,
    *,
    chunk_size: int,
    on_chunk: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Natural-log probability of each token after the first, given all before it.

    Args:
        decoder: the model.
        cache: pages come from it and go back to it.
        pool: the part of them that is near the compute.
        token_ids: int64 ``[N]``, at least two.
        chunk_size: tokens computed at one time, rounded down to pages.
        on_chunk: called with the number of tokens computed after each chunk.

    Returns:
        float32 ``[N - 1]`` on the CPU.

    Raises:
        QueueFullError: if the pool has no room now.
    """
    page_size, num_inputs = pool.layout.page_size, len(token_ids) - 1  # nothing is asked of the last token
    pages = cache.pool.allocate(pool.layout.num_pages(num_inputs))
    if pages is None:
        raise QueueFullError(f"{num_inputs} tokens to score find no free pages: others hold them")
    step = max(page_size, chunk_size - chunk_size % page_size)
    ids = torch.from_numpy(token_ids).to(decoder.device)
    table = torch.tensor([pages], dtype=torch.int32, device=decoder.device)
    scored = []
    try:
        for start in range(0, num_inputs, step):
            stop = min(start + step, num_inputs)
            batch = _lay_out(pool, ids, table, start=start, stop=stop)
            scored.append(_score_rows(decoder, decoder.hidden(batch), ids[start + 1 : stop + 1]))
            if on_chunk is not None:
                on_chunk(stop)
    finally:
        cache.release(pages)
    return torch.cat(scored)


@torch.inference_mode()
def score_as_prompt(
    engine: Engine, token_ids: Int64Array, *, on_chunk: Callable[[int], None] | None = None
) -> torch.Tensor:
    """As ``score_tokens``, for any attention method.

    Raises:
        QueueFullError: if the engine is computing for others.
    """
    if engine.has_work:
        raise QueueFullError("a text is scored alone under this attention: others are computed")
    runner = engine.runner
    assert isinstance(runner, ModelRunner)
    ids = torch.from_numpy(token_ids).to(engine.decoder.device)
    watched = _WatchedDecoder(engine.decoder, ids)
    request = GenerationRequest(uuid.uuid4().hex, tuple(token_ids[:-1].tolist()), SamplingParams(max_tokens=1))
    engine.add(request)
    decoder, runner.decoder = runner.decoder, watched
    try:
        while engine.has_work:
            engine.step()
            if on_chunk is not None:
                on_chunk(watched.num_tokens)
    finally:
        runner.decoder = decoder
        engine.cancel(request.request_id)
    return torch.cat(watched.scored)


class _WatchedDecoder:
    """A decoder that notes how likely the text's tokens are, of a batch that is a chunk of the text."""

    def __init__(self, decoder: PackedDecoder, ids: torch.Tensor) -> None:
        self._decoder, self._ids = decoder, ids
        self.scored: list[torch.Tensor] = []
        self.num_tokens = 0

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Logits as asked for."""
        positions_T, wanted_R = batch.positions_T.clone(), batch.logit_rows_R.clone()
        rows_T = torch.arange(len(positions_T), device=positions_T.device)
        hidden_TC = self._decoder.hidden(replace(batch, logit_rows_R=rows_T))
        self.scored.append(_score_rows(self._decoder, hidden_TC, self._ids[positions_T + 1]))
        self.num_tokens += len(positions_T)
        return self._decoder.logits(hidden_TC[wanted_R])


def _lay_out(pool: PagePool, ids: torch.Tensor, table: torch.Tensor, *, start: int, stop: int) -> PackedBatch:
    """Tokens ``start`` to ``stop`` of one sequence, each with a logit row."""
    device, size = ids.device, pool.layout.page_size
    positions_T = torch.arange(start, stop, device=device)
    num_tokens = stop - start
    return PackedBatch(
        input_ids_T=ids[start:stop],
        positions_T=positions_T,
        slots_T=table[0].long()[positions_T // size] * size + positions_T % size,
        cu_seqlens_B1=torch.tensor([0, num_tokens], dtype=torch.int32, device=device),
        kv_lens_B=torch.tensor([stop], dtype=torch.int32, device=device),
        block_tables_BP=table,
        logit_rows_R=torch.arange(num_tokens, device=device),
        max_q_len=num_tokens,
        max_kv_len=stop,
        pool=pool,
        rope_lens_T=torch.full((num_tokens,), len(ids), device=device),  # rotated as one prompt of all tokens
    )


def _score_rows(decoder: PackedDecoder, hidden_TC: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    """Log probability of each row's target, float32 ``[T]`` on the CPU."""
    num_rows = max(1, SLICE_BYTES // (4 * decoder.spec.vocab_size))
    parts = []
    for start in range(0, len(hidden_TC), num_rows):
        logits_SV = decoder.logits(hidden_TC[start : start + num_rows])
        targets_S = targets_T[start : start + num_rows, None]
        parts.append((logits_SV.gather(1, targets_S).squeeze(1) - logits_SV.logsumexp(-1)).cpu())
    return torch.cat(parts)
