"""A minimal greedy loop over ``PackedDecoder``, and the transformers generation it is compared with.

No engine: every sequence gets its pages up front, prompts are computed whole or in chunks, then all sequences decode
together. Restarts (Phi-3 outgrowing its short RoPE) compute a sequence's KV anew, as transformers does.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from longctx.attention.batch import PackedBatch
from longctx.attention.registry import choose_attention
from longctx.models.checkpoint import inspect_checkpoint
from longctx.models.loading import load_model
from longctx.models.packed import PackedDecoder
from memory.pages import PagePool

PAGE_SIZE = 16  # where the attention implementation takes any


@dataclass
class Sequence:
    """One prompt being continued."""

    token_ids: list[int]
    pages: list[int]
    num_computed: int = 0
    rope_prompt_len: int = 0
    new_ids: list[int] = field(default_factory=list)


def load_decoder(path: Path, *, attention: str = "torch", dtype: torch.dtype = torch.float32) -> PackedDecoder:
    """A decoder on the CPU."""
    spec, device = inspect_checkpoint(path), torch.device("cpu")
    backend = choose_attention(attention, device, dtype, spec.head_dim)
    return PackedDecoder(load_model(spec, dtype=dtype, device=device), backend)


def generate_packed(
    decoder: PackedDecoder, prompts: list[list[int]], *, num_new: int, chunk_size: int = 1 << 30
) -> list[list[int]]:
    """New token ids of each prompt, all prompts in one batch."""
    layout = decoder.layout((*decoder.backend.page_sizes, PAGE_SIZE)[0])
    per_sequence = layout.num_pages(max(map(len, prompts)) + num_new)
    pool = PagePool(layout, per_sequence * len(prompts))
    sequences = []
    for prompt in prompts:
        pages = pool.allocate(per_sequence)
        assert pages is not None
        sequences.append(Sequence(list(prompt), pages, rope_prompt_len=len(prompt)))
    while any(len(sequence.new_ids) < num_new for sequence in sequences):
        step(decoder, pool, [s for s in sequences if len(s.new_ids) < num_new], chunk_size=chunk_size)
    return [sequence.new_ids for sequence in sequences]


def step(decoder: PackedDecoder, pool: PagePool, sequences: list[Sequence], *, chunk_size: int) -> None:
    """Compute up to ``chunk_size`` tokens of each sequence, and append a token to each that is up to date."""
    for sequence in sequences:
        restart = decoder.rotary.restart_length
        if restart is not None and sequence.rope_prompt_len <= restart < len(sequence.token_ids):
            sequence.num_computed, sequence.rope_prompt_len = 0, len(sequence.token_ids)
    counts = [min(len(s.token_ids) - s.num_computed, chunk_size) for s in sequences]
    batch, finished = make_batch(pool, sequences, counts)
    logits = decoder.forward(batch)
    for sequence, count in zip(sequences, counts, strict=True):
        sequence.num_computed += count
    for sequence, token_id in zip(finished, logits.argmax(-1).tolist(), strict=True):
        sequence.token_ids.append(token_id)
        sequence.new_ids.append(token_id)


def make_batch(pool: PagePool, sequences: list[Sequence], counts: list[int]) -> tuple[PackedBatch, list[Sequence]]:
    """The next ``counts`` tokens of each sequence, and the sequences whose last token is among them."""
    page_size = pool.layout.page_size
    input_ids, positions, slots, rope_lens, logit_rows, borders = [], [], [], [], [], [0]
    finished = []
    for sequence, count in zip(sequences, counts, strict=True):
        todo = range(sequence.num_computed, sequence.num_computed + count)
        input_ids += [sequence.token_ids[position] for position in todo]
        positions += todo
        slots += [sequence.pages[p // page_size] * page_size + p % page_size for p in todo]
        rope_lens += [max(sequence.rope_prompt_len, position + 1) for position in todo]
        borders.append(len(positions))
        if todo.stop == len(sequence.token_ids):
            logit_rows.append(len(positions) - 1)
            finished.append(sequence)
    kv_lens = [s.num_computed + count for s, count in zip(sequences, counts, strict=True)]
    batch = PackedBatch(
        input_ids_T=torch.tensor(input_ids),
        positions_T=torch.tensor(positions),
        slots_T=torch.tensor(slots),
        cu_seqlens_B1=torch.tensor(borders, dtype=torch.int32),
        kv_lens_B=torch.tensor(kv_lens, dtype=torch.int32),
        block_tables_BP=torch.tensor([s.pages for s in sequences], dtype=torch.int32),
        logit_rows_R=torch.tensor(logit_rows, dtype=torch.int64),
        max_q_len=max(counts),
        max_kv_len=max(kv_lens),
        pool=pool,
        rope_lens_T=torch.tensor(rope_lens),
    )
    return batch, finished


def generate_reference(path: Path, prompts: list[list[int]], *, num_new: int) -> list[list[int]]:
    """transformers' greedy continuation of each prompt; a fresh model each, since dynamic RoPE has a state."""
    outputs = []
    for prompt in prompts:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        model.generation_config.eos_token_id = None
        ids = torch.tensor([prompt])
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
        out = model.generate(ids, max_new_tokens=num_new, **options)
        outputs.append(out[0, len(prompt) :].tolist())
    return outputs
