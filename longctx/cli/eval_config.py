"""What ``longctx eval`` takes. No torch here."""

from dataclasses import dataclass, field

from longctx.attention.config import AttentionConfig
from longctx.engine.config import EngineConfig
from longctx.evaluation.config import EvalConfig
from longctx.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class EvalCommandConfig:
    """Everything ``longctx eval`` takes."""

    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig, metadata={"folder": "serve_attention"})
    eval: EvalConfig = field(default_factory=EvalConfig)
