"""Builds what one rank trains with: the world, the model with its adapter and attention, DeepSpeed, data."""

import logging
import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from longctx.adapters.adapter import add_adapter, whole_shapes
from longctx.errors import CheckpointError, ConfigError
from longctx.models.attention_spec import LandmarkSpec
from longctx.models.checkpoint import inspect_checkpoint
from longctx.models.tokenizer import Tokenizer, load_tokenizer
from longctx.training.attention import ATTENTION
from longctx.training.attention_choice import describe_attention, place_landmark_token, settle_attention
from longctx.training.config import TrainConfig
from longctx.training.data.packing import PackedSequence
from longctx.training.data.stream import SequenceStream, merge_states, read_eval_sequences
from longctx.training.deepspeed_engine import DeepSpeedTraining, WeightSharder
from longctx.training.flops import count_training_flops
from longctx.training.loss_head import LossHead
from longctx.training.memory_saving import save_memory
from longctx.training.peak import choose_dtype, measure_peak_flops, read_peak_memory
from longctx.training.place import RankPlace
from longctx.training.preflight import read_links, read_trained_attention
from longctx.training.resume import check_weights, find_checkpoint
from longctx.training.sequence_parallel import SequenceParallel
from longctx.training.starting_model import DTYPES, build_starting_model
from longctx.training.world import TrainingWorld

logger = logging.getLogger(__name__)


class RunParts:
    """All of one rank's; ``close`` ends it. Collective.

    Args:
        config: of the run; the attribute of the name has what was left to the ranks, too.
        place: of the rank.

    Raises:
        ConfigError, CheckpointError: for what cannot be trained.
    """

    def __init__(self, config: TrainConfig, place: RankPlace) -> None:
        self.device = choose_device(config.model.device)
        self.spec = inspect_checkpoint(config.model.path, require_weights=config.model.init == "checkpoint")
        tokenizer = load_tokenizer(self.spec, config.data.chat_template)
        if tokenizer.vocab_size > self.spec.vocab_size:
            raise CheckpointError(
                f"{self.spec.path}: the tokenizer has {tokenizer.vocab_size} tokens, the model {self.spec.vocab_size}"
            )
        self._settle_attention(config, tokenizer, is_first=place.global_rank == 0)
        parallel = config.parallel
        self.world = TrainingWorld(
            place.global_rank, parallel, address=place.master_address, port=place.master_port, device=self.device
        )
        self.config = config = self._settle_dtype(replace(config, attention=self._attention))
        self.peak_flops = config.logger.peak_flops or measure_peak_flops(self.device, DTYPES[config.model.dtype])
        self._build_model()
        reader = find_checkpoint(config, restart=place.restart)
        if reader is not None:
            check_weights(reader, self.shapes, config)
            self.engine.restore(reader.state["step"], reader.read)
        self.first_step: int = reader.state["step"] if reader else 0
        self.first_loss: float = reader.state["loss"] if reader else float("nan")
        lanes_per_rank = config.train.batch_size // parallel.dp_degree
        first_lane = self.world.at.dp_rank * lanes_per_rank
        self.stream = SequenceStream(
            config.data,
            tokenizer,
            context_length=config.train.context_length,
            num_lanes=config.train.batch_size,
            lanes=range(first_lane, first_lane + lanes_per_rank),
            landmarks=self._landmarks,
            state=merge_states(each for each in reader.data if each) if reader else None,
        )
        self.eval_sequences = (
            read_eval_sequences(
                config.data,
                tokenizer,
                context_length=config.train.context_length,
                num_sequences=config.train.eval_sequences,
                landmarks=self._landmarks,
            )
            if config.data.eval_path
            else []
        )

    def loss(self, sequence: PackedSequence, *, scale: float = 1.0) -> torch.Tensor:
        """``scale`` times the summed losses of this rank's part of a sequence."""
        shard = self.parallel.shard(
            sequence.input_ids.to(self.device),
            labels=sequence.labels.to(self.device),
            cu_seqlens=sequence.cu_seqlens,
        )
        return self.parallel.sum_loss(shard, partial(self._head.loss, self.engine, scale=scale, use_cache=False))

    def count_flops(self, sequence: PackedSequence) -> int:
        """That forward and backward of a whole sequence need."""
        return count_training_flops(
            self.spec,
            sequence.cu_seqlens,
            attention=self.config.attention,
            trains_base=not self.has_adapter,
            num_adapter_weights=self._num_adapter_weights,
        )

    def read_memory(self) -> int:
        """The most bytes that this rank has held."""
        return read_peak_memory(self.device)

    def close(self) -> None:
        """End threads and groups."""
        self.stream.close()
        self.engine.destroy()
        self.world.close()

    def _settle_attention(self, config: TrainConfig, tokenizer: Tokenizer, *, is_first: bool) -> None:
        """The attention that is trained, and ``spec`` as it becomes by it."""
        spec = read_trained_attention(self.spec, config)
        self._attention = settle_attention(
            config.attention, spec, context_length=config.train.context_length, peft=config.peft
        )
        token_id, vocab_size = None, spec.vocab_size
        if self._attention.name == "landmark":
            token_id, vocab_size = place_landmark_token(spec, has_token=tokenizer.has_token)
        added = (vocab_size - spec.vocab_size) * spec.hidden_size * (1 if spec.tie_word_embeddings else 2)
        self.spec = replace(
            spec,
            vocab_size=vocab_size,
            num_parameters=spec.num_parameters + added,
            attention=describe_attention(self._attention, token_id),
        )
        if self.spec.attention != spec.attention and is_first:
            before = spec.attention or "dense attention"
            logger.info("%s was trained with %s; here it is %s", spec.name, before, self.spec.attention)

    @property
    def _landmarks(self) -> LandmarkSpec | None:
        return self.spec.attention if isinstance(self.spec.attention, LandmarkSpec) else None

    def _settle_dtype(self, config: TrainConfig) -> TrainConfig:
        """With ``model.dtype`` as it is trained: auto is what is fast on every rank. Collective."""
        dtype = choose_dtype(config.model.dtype, self.device.type)
        (is_wide,) = self.world.largest([float(dtype == "float32")])
        return replace(config, model=replace(config.model, dtype="float32" if is_wide else dtype))

    def _build_model(self) -> None:
        config, parallel = self.config, self.config.parallel
        dtype = DTYPES[config.model.dtype]
        sharder = WeightSharder(config.deepspeed, dtype) if config.deepspeed.zero_stage == 3 else None
        model = build_starting_model(
            self.spec,
            config.model,
            context_length=config.train.context_length,
            device=self.device,
            seed=config.train.seed,
            sharder=sharder,
        )
        model.config.use_cache = False
        self.has_adapter = config.peft.method != "none" or config.peft.path is not None
        if self.has_adapter:
            gather = nullcontext if sharder is None else sharder.gather
            add_adapter(model, config.peft, seed=config.train.seed, gather=gather)
        self.parallel = SequenceParallel(
            model,
            group=self.world.sp_group,
            layout=parallel.layout,
            plan=parallel.plan,
            links=read_links(parallel),
            timeout_s=parallel.timeout_s,
            method=ATTENTION.get(config.attention.name)(config.attention),
            landmark_token_id=None if self._landmarks is None else self._landmarks.landmark_token_id,
        )
        self._head = LossHead(model, tile=config.train.loss_tile)
        leaves = save_memory(model, config.train, device=self.device, scratch=Path(config.output))
        parameters = dict(model.named_parameters())
        shapes = whole_shapes(model)
        self.shapes = {name: list(shapes[name]) for name, weight in parameters.items() if weight.requires_grad}
        self._num_adapter_weights = sum(map(math.prod, self.shapes.values())) if self.has_adapter else 0
        self.engine = DeepSpeedTraining(
            model,
            parameters,
            config=config.deepspeed,
            optimizer=config.optimizer,
            dtype=dtype,
            num_micro_steps=config.train.batch_size // parallel.dp_degree,
            leaves=leaves,
        )


def choose_device(name: str) -> torch.device:
    """``auto``: a GPU if there is one. Raises ``ConfigError`` for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("model.device=cuda is not allowed: torch finds no GPU for this rank; cpu, or fewer ranks")
    return torch.device(name)
