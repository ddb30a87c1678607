"""Loads a checked checkpoint with transformers.

The one module of serving that builds transformers models. What it returns is taken apart by ``packed.py``, layer by
layer, so that two copies of the weights never exist together.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from longctx.adapters.adapter import apply_adapter
from longctx.adapters.folder import AdapterFolder
from longctx.errors import CheckpointError
from longctx.models.checkpoint import ModelSpec
from longctx.models.rope import RotaryTable
from longctx.models.sharded_model import Sharder, draw_weights, read_weights, refuse_problems

logger = logging.getLogger(__name__)

# While transformers builds a model, it patches PreTrainedModel and torch's default dtype for the whole process. Two
# threads that do so at once restore each other's patches: from then on no model in the process has tied weights.
_TRANSFORMERS_LOCK = threading.Lock()


@dataclass(slots=True)
class LoadedModel:
    """A transformers model with what running it needs to know."""

    spec: ModelSpec
    config: Any  # the transformers configuration
    model: PreTrainedModel | None  # None once its weights were taken
    rotary: RotaryTable
    dtype: torch.dtype
    device: torch.device

    def release(self) -> None:
        """Drop the transformers model."""
        self.model = None


def load_model(
    spec: ModelSpec,
    *,
    dtype: torch.dtype,
    device: torch.device,
    random_weights_seed: int | None = None,
    adapter: AdapterFolder | None = None,
) -> LoadedModel:
    """Load the weights of ``spec`` in ``dtype``.

    Args:
        spec: from ``inspect_checkpoint``.
        dtype: float32, bfloat16 or float16.
        device: where the model will run. Stored weights stay on the CPU until ``PackedDecoder`` moves them one by one.
        random_weights_seed: make weights up instead of reading them, reproducibly (benchmarks).
        adapter: merged into the weights, or attached to the model where it cannot be; it brings its RoPE.

    Raises:
        CheckpointError: if weights are missing, left over or of the wrong shape.
    """
    config = read_transformers_config(spec)
    for name, value in adapter.rope.items() if adapter is not None else ():
        setattr(config, name, value)
    model = build_model(spec, config, dtype=dtype, device=device, random_weights_seed=random_weights_seed)
    if adapter is not None:
        apply_adapter(model, adapter)
    model.eval().requires_grad_(False)
    rotary = RotaryTable(config, device=device)
    return LoadedModel(spec, config, model, rotary, dtype, device)


def read_transformers_config(spec: ModelSpec) -> Any:
    """The checkpoint's configuration as transformers has it; raises ``CheckpointError`` if it refuses."""
    try:
        return AutoConfig.from_pretrained(spec.path, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"{spec.path}: config.json is refused by transformers: {error}") from error


def build_model(
    spec: ModelSpec,
    config: Any,
    *,
    dtype: torch.dtype,
    device: torch.device,
    random_weights_seed: int | None = None,
    sharder: Sharder | None = None,
) -> PreTrainedModel:
    """A transformers model of ``spec``'s weights that is otherwise as ``config`` says. See ``load_model``; a higher
    ``vocab_size`` than the checkpoint's adds rows (``read_weights``).

    ``sharder``: cuts the weights up as they come; they are on ``device`` then.
    """
    with _TRANSFORMERS_LOCK:
        if random_weights_seed is not None:
            return draw_weights(config, dtype=dtype, device=device, seed=random_weights_seed, sharder=sharder)
        if sharder is not None or config.vocab_size != read_transformers_config(spec).vocab_size:
            model = read_weights(spec, config, dtype=dtype, device=device, sharder=sharder)
        else:
            model = _read_weights(spec, config, dtype)
    logger.info("loaded %s: %.1f million parameters in %s", spec.path, spec.num_parameters / 1e6, dtype)
    return model


def _read_weights(spec: ModelSpec, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    try:
        with _no_progress_bar():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                spec.path,
                config=config,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{spec.path}: weights cannot be loaded: {error}") from error
    model, info = loaded
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    refuse_problems(spec, {kind: info.get(kind) or () for kind in kinds})
    return model


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Workers and generated text share the terminal with it."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()
