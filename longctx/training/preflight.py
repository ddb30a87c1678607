"""What can be wrong with ``longctx train`` before anything runs, found in two seconds and without Ray or torch."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from longctx.adapters.folder import choose_adapter
from longctx.adapters.registry import ADAPTERS
from longctx.errors import CheckpointError, ConfigError
from longctx.models.checkpoint import ModelSpec, inspect_checkpoint, weight_shapes
from longctx.models.tensor_files import read_json
from longctx.training.attention_choice import check_sf, settle_attention
from longctx.training.config import ParallelConfig, TrainConfig, TrainModelConfig
from longctx.training.data.sources import check_path
from longctx.training.sinks.wandb import is_wanted
from parallel.links import LinkModel, load_links

MIN_TOKENS_PER_RANK = 8  # packed documents may leave a rank without a token below a few of them
CHECKPOINTS = "checkpoints/step-*/state.json"  # in the output folder


def check_config(config: TrainConfig) -> None:
    """Raise ``ConfigError`` for keys that are allowed each, but not together; the text says what would fit."""
    for check in _CHECKS:
        check(config)


def check_files(config: TrainConfig) -> None:
    """Raise ``ConfigError`` or ``CheckpointError`` for a model or data that cannot be trained on, as seen from here."""
    has_weights = config.model.init == "checkpoint"
    spec = inspect_checkpoint(config.model.path, require_weights=has_weights)
    check_context(spec, config.model, config.train.context_length)
    _check_attention(read_trained_attention(spec, config), config)
    if config.peft.method != "none" and config.peft.path is None:
        ADAPTERS.get(config.peft.method)().describe(config.peft, weight_shapes(spec))
    read_links(config.parallel)
    is_wanted(config.logger)
    check_path(config.data.path, config.data)
    template = config.data.chat_template
    if template is not None and not Path(template).is_file():
        raise ConfigError(f"data.chat_template={template} is not allowed: there is no such file")
    if config.data.eval_path is not None:
        check_path(config.data.eval_path, config.data, option="data.eval_path")
    if config.checkpoint.resume == "must" and not any(Path(config.output).glob(CHECKPOINTS)):
        raise CheckpointError(f"{config.output}: there is no checkpoint, and checkpoint.resume is must")


def read_trained_attention(spec: ModelSpec, config: TrainConfig) -> ModelSpec:
    """The model with the attention that it and ``peft.path``'s adapter were trained with; raises ``CheckpointError``
    for an adapter that does not go with it."""
    if config.model.init != "checkpoint":
        return spec
    adapted, _ = choose_adapter(config.peft.path, spec)
    return replace(spec, attention=adapted.attention)


def check_context(spec: ModelSpec, config: TrainModelConfig, context_length: int) -> None:
    """Raise ``ConfigError`` if the model does not take ``context_length`` tokens as configured."""
    if context_length > spec.max_context and config.rope_scaling == "keep" and config.rope_theta is None:
        raise ConfigError(
            f"train.context_length={context_length} is not allowed: {spec.name} takes at most {spec.max_context} "
            "tokens; model.rope_scaling=yarn (or linear, dynamic) or a higher model.rope_theta stretches it"
        )
    if config.rope_scaling != "keep" and spec.rope_type not in ("default", config.rope_scaling):
        raise ConfigError(
            f"model.rope_scaling={config.rope_scaling} is not allowed: {spec.name} has {spec.rope_type} scaling; keep"
        )


def read_links(config: ParallelConfig) -> LinkModel | None:
    """The link model of ``links_file``; raises ``ConfigError`` for a file that is none."""
    if config.links_file is None:
        return None
    try:
        return load_links(Path(config.links_file))
    except ValueError as error:
        raise ConfigError(f"parallel.links_file is not allowed: {error}; longctx plan links writes one") from None


def check_cores(config: TrainConfig) -> None:
    """Raise ``ConfigError`` if a Ray of our own on this machine has fewer CPUs than the ranks reserve."""
    num_ranks = config.parallel.dp_degree * config.parallel.sp_degree
    num_cores = len(os.sched_getaffinity(0))
    if num_ranks * config.cluster.cpus_per_rank <= num_cores:
        return
    raise ConfigError(
        f"parallel.dp_degree={config.parallel.dp_degree} x parallel.sp_degree={config.parallel.sp_degree} are "
        f"{num_ranks} ranks of {config.cluster.cpus_per_rank:g} CPUs, and this machine has {num_cores}; "
        f"cluster.cpus_per_rank={int(100 * num_cores / num_ranks) / 100:g} lets them share cores, "
        "cluster.address=HOST:PORT takes a Ray cluster"
    )


def _check_attention(spec: ModelSpec, config: TrainConfig) -> None:
    dropout = read_json(spec.path / "config.json").get("attention_dropout")
    if dropout:
        raise CheckpointError(f"{spec.path}: config.json: attention_dropout={dropout} is not supported in training; 0")
    settle_attention(config.attention, spec, context_length=config.train.context_length, peft=config.peft)


def _check_batch(config: TrainConfig) -> None:
    parallel, batch_size = config.parallel, config.train.batch_size
    if batch_size % parallel.dp_degree:
        lower = batch_size // parallel.dp_degree * parallel.dp_degree
        fits = " or ".join(str(size) for size in (lower, lower + parallel.dp_degree) if size)
        raise ConfigError(
            f"train.batch_size={batch_size} is not allowed with parallel.dp_degree={parallel.dp_degree}: each group "
            f"of ranks trains on as many sequences; a batch of {fits} would fit"
        )


def _check_length(config: TrainConfig) -> None:
    sp_degree, length = config.parallel.sp_degree, config.train.context_length
    if sp_degree > 1 and length < sp_degree * MIN_TOKENS_PER_RANK:
        raise ConfigError(
            f"train.context_length={length} is not allowed with parallel.sp_degree={sp_degree}: at least "
            f"{sp_degree * MIN_TOKENS_PER_RANK}, {MIN_TOKENS_PER_RANK} tokens a rank; "
            + (f"parallel.sp_degree={length // MIN_TOKENS_PER_RANK or 1} would fit")
        )


def _check_offload(config: TrainConfig) -> None:
    deepspeed = config.deepspeed
    for name, is_on, stages in (
        ("offload_optimizer", deepspeed.offload_optimizer, "1, 2 or 3"),
        ("offload_params", deepspeed.offload_params, "3"),
    ):
        if is_on and str(deepspeed.zero_stage) not in stages:
            raise ConfigError(
                f"deepspeed.{name}=true is not allowed with deepspeed.zero_stage={deepspeed.zero_stage}: it takes "
                f"stage {stages}"
            )
    if config.train.activation_offload and not config.train.activation_checkpointing:
        raise ConfigError(
            "train.activation_offload=true with train.activation_checkpointing=false is not allowed: only what "
            "checkpointing keeps is offloaded; set train.activation_checkpointing=true"
        )


def _check_evaluation(config: TrainConfig) -> None:
    if config.train.eval_every and config.data.eval_path is None:
        raise ConfigError(
            f"train.eval_every={config.train.eval_every} is not allowed without data.eval_path, which is evaluated on"
        )


def _check_trace(config: TrainConfig) -> None:
    missing = [step for step in config.logger.trace_steps if not 1 <= step <= config.train.num_steps]
    if missing:
        raise ConfigError(
            f"logger.trace_steps={list(config.logger.trace_steps)} is not allowed: there is no step {missing[0]}; 1 "
            f"to train.num_steps, {config.train.num_steps}"
        )


def _check_sf(config: TrainConfig) -> None:
    if config.attention.name == "sf":
        check_sf(config.attention)


_CHECKS: tuple[Callable[[TrainConfig], None], ...] = (
    _check_batch,
    _check_length,
    _check_offload,
    _check_evaluation,
    _check_trace,
    _check_sf,
)
