"""What ``longctx generate`` takes. No torch here."""

from dataclasses import dataclass, field

from longctx.attention.config import AttentionConfig
from longctx.engine.config import EngineConfig
from longctx.models.config import ModelConfig
from parallel.option import option


@dataclass(frozen=True, slots=True)
class GenerateConfig:
    """The prompt and how to continue it."""

    prompt: str | None = option(None, "text to continue")
    prompt_file: str | None = option(
        None, "file with the text, - for standard input; put before generate.prompt if both are given"
    )
    chat: str = option(
        "auto", "send it as a user's message; auto: if the model has a chat template", choices=("auto", "true", "false")
    )
    max_tokens: int = option(256, "new tokens at most", minimum=1)
    temperature: float = option(0.0, "0 is greedy", minimum=0)
    top_p: float = option(1.0, "share of probability mass to sample from", above=0, maximum=1)
    top_k: int = option(0, "most likely tokens to sample from; 0: all", minimum=0)
    min_p: float = option(0.0, "least probability, relative to the most likely token's", minimum=0, maximum=1)
    seed: int | None = option(None, "same seed, same text; null: another each time")
    stop: list[str] = option([], "strings that end the text")
    progress: str = option(
        "auto", "show the progress of the prompt; auto: on a terminal", choices=("auto", "true", "false")
    )


@dataclass(frozen=True, slots=True)
class GenerateCommandConfig:
    """Everything ``longctx generate`` takes."""

    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig, metadata={"folder": "serve_attention"})
    generate: GenerateConfig = field(default_factory=GenerateConfig)
