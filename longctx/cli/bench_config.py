"""What ``longctx bench`` takes. No torch here."""

from dataclasses import dataclass, field

from longctx.attention.config import AttentionConfig
from longctx.engine.config import EngineConfig
from longctx.models.config import ModelConfig
from parallel.option import option, parse_size


@dataclass(frozen=True, slots=True)
class BenchConfig:
    """What is measured, and what is not but belongs to the profile."""

    file: str = option("machine.json", "where the profile is written")
    name: str | None = option(None, "the profile's name; null: the model's and the machine's")
    num_rounds: int = option(5, "measurements of each time, of which the median counts", minimum=1)
    max_sequences: int = option(32, "sequences that decode together at most", minimum=2)
    network_bytes_s: str = option("1GiB", "bytes a second at which KV leaves the machine", parse=parse_size)
    overhead_ms: float = option(0.0, "milliseconds that router and endpoint add to the time of every token", minimum=0)
    watts: float = option(0.0, "of the machine", minimum=0)
    cost_per_hour: float = option(0.0, "of the machine", minimum=0)


@dataclass(frozen=True, slots=True)
class BenchCommandConfig:
    """Everything ``longctx bench`` takes."""

    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig, metadata={"folder": "serve_attention"})
    bench: BenchConfig = field(default_factory=BenchConfig)
