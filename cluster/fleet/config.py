"""What ``longctx plan cluster`` takes."""

from dataclasses import dataclass, field

from cluster.fleet.trace import SHAPES
from cluster.policies import POLICIES
from parallel.option import option


@dataclass(frozen=True, slots=True)
class FleetConfig:
    """The machines, and how requests are placed on them."""

    prefill: list[str] = option(
        ["llama2-70b-dgx-h100:25"],
        "machines started for prompts, as PROFILE:COUNT; a profile is one that longctx has, or what longctx bench "
        "wrote; empty: decode machines compute prompts",
    )
    decode: list[str] = option(["llama2-70b-dgx-h100:15"], "machines started to generate, as PROFILE:COUNT")
    policy: str = option("splitwise", "how requests are placed, as cluster.policy", choices=tuple(POLICIES))
    local_prefill_tokens: int = option(
        512, "prompts with at most this many tokens are computed where they are decoded", minimum=0
    )
    reference: str | None = option(
        None, "profile whose times alone are 1x for the objectives; null: the first decode machine's"
    )


@dataclass(frozen=True, slots=True)
class TraceConfig:
    """The requests."""

    shape: str = option("azure_conversation", "lengths and arrivals of this published trace", choices=tuple(SHAPES))
    file: str | None = option(
        None, "JSONL with arrival_s, num_prompt_tokens and num_output_tokens, in place of a shape"
    )
    rate: float | None = option(70.0, "requests a second; null: the file's", above=0)
    duration_s: float = option(60.0, "seconds over which requests of a shape come", above=0)
    steady: bool = option(False, "requests of a shape come as those of independent users do, not in its bursts")
    seed: int = option(0, "of what is drawn", minimum=0)


@dataclass(frozen=True, slots=True)
class PlanClusterConfig:
    """Everything ``longctx plan cluster`` takes."""

    fleet: FleetConfig = field(default_factory=FleetConfig)
    trace: TraceConfig = field(default_factory=TraceConfig)
    splits: bool = option(False, "try other ratios of prefill to decode machines, if all are alike")
    find_rate: bool = option(False, "find the highest rate that meets all nine objectives")
    picture: str | None = option(None, "PNG file of latencies and objectives over the rate")
    json_file: str | None = option(None, "file that gets all numbers as JSON")
