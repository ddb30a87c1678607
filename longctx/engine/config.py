"""What the ``engine`` group of the configuration holds. No torch here."""

from dataclasses import dataclass

from memory.config import EVICTION_NAMES
from parallel.option import option, parse_budget, parse_size

KV_SHARES = {"cpu": 0.3, "cuda": 0.8}  # kv_bytes=auto: of what is available (workers share it), or free after weights


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Pages, batches and queues of one engine."""

    kv_bytes: str = option("auto", "KV budget, as 4GiB; auto: a share of the free memory", parse=parse_budget)
    page_size: int | None = option(None, "tokens per page; null: what the attention implementation prefers", minimum=1)
    max_batch_tokens: int = option(2048, "tokens computed in one step, prefill chunks and decode together", minimum=16)
    mixed_share: float = option(
        0.25,
        "of those tokens that prompts get while sequences decode: more is a faster first token, slower others",
        above=0,
        maximum=1,
    )
    max_sequences: int = option(128, "sequences decoded together at most", minimum=1)
    max_waiting: int = option(512, "requests that may wait before new ones are refused", minimum=1)
    prefix_cache: bool = option(True, "share the pages of equal prompt prefixes")
    prefix_eviction: str = option(
        "lru",
        "which page of a prefix that nobody holds goes first, here and in prefix_folder; lru: the least recently used; "
        "lfu: the least often used, with ageing, so that a common system prompt outlives documents that come once",
        choices=EVICTION_NAMES,
    )
    prefix_folder: str | None = option(
        None,
        "folder that keeps pages of prefixes, for the next start and for every worker that sees it; all ranks of one "
        "worker have to; null: none",
    )
    prefix_bytes: str = option("8GiB", "that this folder may hold for one model", parse=parse_size)
    num_threads: int | None = option(None, "CPU threads; null: every core this process may use", minimum=1)
    cuda_graphs: bool = option(True, "capture decode steps as CUDA graphs on a GPU")
