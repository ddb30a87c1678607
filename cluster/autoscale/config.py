"""What ``cluster.autoscale`` of the configuration holds. Neither ray nor torch here."""

from dataclasses import dataclass, field

from parallel.option import option

PENDING_TOKENS = "prompt tokens per worker, placed or waiting, above which the pool is short of workers; "


@dataclass(frozen=True, slots=True)
class PrefillScaling:
    """How many prefill workers there may be, and when they are too few."""

    min_workers: int = option(1, "prefill workers that there are at least", minimum=1)
    max_workers: int = option(1, "prefill workers that there are at most", minimum=1)
    max_pending_tokens: int | None = option(
        None, PENDING_TOKENS + "null: as many as the router gives one at a time", minimum=1
    )


@dataclass(frozen=True, slots=True)
class DecodeScaling:
    """How many decode workers there may be, and when they are too few."""

    min_workers: int = option(1, "decode workers that there are at least", minimum=1)
    max_workers: int = option(1, "decode workers that there are at most", minimum=1)
    max_pending_tokens: int | None = option(
        None, PENDING_TOKENS + "counted if there are no prefill workers; null: four steps' tokens", minimum=1
    )
    max_page_share: float = option(
        0.85, "share of the KV pages in use above which the pool is short of workers", above=0, maximum=1
    )
    max_waiting: float = option(
        1.0, "requests per worker that wait for room, above which the pool is short of workers", above=0
    )


@dataclass(frozen=True, slots=True)
class AutoscaleConfig:
    """When pools grow and shrink."""

    enabled: bool = option(False, "start and drain workers by load; each pool between its min_workers and max_workers")
    prefill: PrefillScaling = field(default_factory=PrefillScaling)
    decode: DecodeScaling = field(default_factory=DecodeScaling)
    ttft_target_s: float | None = option(
        None, "seconds to the first token that are good enough; more makes the pool that computes prompts grow", above=0
    )
    tpot_target_s: float | None = option(
        None, "seconds for each further token that are good enough; more makes the decode pool grow", above=0
    )
    percentile: float = option(90.0, "of the requests of window_s that the targets are for", above=0, maximum=100)
    window_s: float = option(30.0, "seconds that count for the targets", above=0)
    interval_s: float = option(1.0, "seconds between two looks", above=0)
    grow_after_s: float = option(10.0, "seconds that a pool has to be short before it grows", minimum=0)
    shrink_after_s: float = option(
        120.0, "seconds that one worker less has to be enough before a pool shrinks", minimum=0
    )
    shrink_below: float = option(
        0.5, "share of what the others may have that they may get when a pool shrinks", above=0, maximum=0.9
    )
    cooldown_s: float = option(30.0, "seconds between two changes of one pool", minimum=0)
    max_step: int = option(1, "workers by which a pool grows at one time at most", minimum=1)
    place_timeout_s: float = option(
        600.0, "seconds that a new worker waits for room in the Ray cluster, or for a node that Ray adds", above=0
    )
    retry_s: float = option(
        30.0, "seconds after a start that failed before the next one; doubled each time, at most 32-fold", above=0
    )

    def pool_of(self, role: str) -> PrefillScaling | DecodeScaling:
        """The pool of one role."""
        return self.prefill if role == "prefill" else self.decode
