"""A module trained by DeepSpeed: ZeRO 0 to 3 over all ranks of the world. The one module that knows DeepSpeed.

ZeRO shards over every rank, those that share a sequence included: each rank's loss is its part of the mean over all
ranks' tokens, and DeepSpeed averages gradients, so a loss is multiplied by the number of ranks first.

What a rank has to save are ``fragments``: ranges of the flattened master weights with their optimizer states, in
float32, that lie on this rank. Together the ranks' fragments are every trained weight once, whatever the stage, which
is what makes a checkpoint fit any number of ranks and any stage.
"""

import io
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from longctx.training.config import DeepSpeedConfig, OptimizerConfig
from parallel.option import parse_size

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's states, as torch names them
_QUIET_STEPS = 1 << 62  # between DeepSpeed's own progress lines


ReadElements = Callable[[str, str, int, int], torch.Tensor]
"""``(name, part, start, num_elements)`` to ``[num_elements]`` float32 of a checkpoint."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """Elements ``[start, start + len(master))`` of a flattened parameter, as views of what is trained."""

    name: str
    start: int
    master: torch.Tensor  # float32 [n]
    moments: dict[str, torch.Tensor]  # of MOMENTS, float32 [n]; empty before the first step


class DeepSpeedTraining:
    """Forward, backward and step of one module over all ranks. Collective, as is everything here.

    Args:
        module: what is called; equal on all ranks.
        parameters: its weights by the names that checkpoints use, frozen ones too.
        config, optimizer: see there.
        dtype: of the module's weights: float32 or bfloat16.
        num_micro_steps: backward passes for one step.
        leaves: parts of ``module`` whose weights ZeRO-3 has to gather together.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        parameters: dict[str, torch.nn.Parameter],
        *,
        config: DeepSpeedConfig,
        optimizer: OptimizerConfig,
        dtype: torch.dtype,
        num_micro_steps: int,
        leaves: Sequence[torch.nn.Module] = (),
    ) -> None:
        deepspeed = _start_deepspeed()
        for leaf in leaves if config.zero_stage == 3 else ():
            deepspeed.utils.set_z3_leaf_module(leaf, True)
        self._gathered = deepspeed.zero.GatheredParameters
        self._stage, self._num_micro_steps, self._num_passes = config.zero_stage, num_micro_steps, 0
        self._world_size, self._rank = dist.get_world_size(), dist.get_rank()
        self._trained = {name: weight for name, weight in parameters.items() if weight.requires_grad}
        adam = torch.optim.AdamW(
            _group_by_decay(self._trained, optimizer.weight_decay),
            lr=0.0,  # until the first step: DeepSpeed may make one of its own, without gradients
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
        )
        settings = _describe(config, optimizer, dtype, self._world_size, num_micro_steps)
        with redirect_stdout(io.StringIO()):  # it prints how much memory is used, on its way
            self._engine, self._optimizer, *_ = deepspeed.initialize(model=module, optimizer=adam, config=settings)
        self._adam: torch.optim.Optimizer = adam
        adam.state.clear()  # nor does that step count

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """The module's forward."""
        return self._engine(*arguments, **named)

    def train(self, mode: bool = True) -> None:
        """Training or evaluation."""
        self._engine.train(mode)

    def backward(self, loss: torch.Tensor) -> None:
        """Add gradients of this rank's part of the loss; the last of a step's reduces them over the ranks."""
        if self._num_passes % self._num_micro_steps:
            self._engine.step()  # which only counts, within a step
        self._engine.backward(loss * self._world_size, scale_wrt_gas=False)
        self._num_passes += 1

    def step(self, lr: float) -> float:
        """Step the weights; returns the norm of the gradients before they were clipped."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        norm = self._whole_norm() if self._stage == 0 else None
        self._engine.step()
        norm = self._engine.get_global_grad_norm() if norm is None else norm
        return float(norm) if norm is not None else float("nan")

    def gather(self, parameters: Iterable[torch.nn.Parameter]) -> AbstractContextManager[Any]:
        """While it is open, these parameters are whole on every rank."""
        return self._gathered(list(parameters)) if self._stage == 3 else nullcontext()

    def fragments(self) -> Iterator[Fragment]:
        """This rank's, in an order that is the same every time."""
        for index, fragment in enumerate(self._find_all()):
            if (
                self._stage or index % self._world_size == self._rank
            ):  # without ZeRO every rank has all: they take turns
                yield fragment

    def restore(self, step: int, read: ReadElements) -> None:
        """Go on from a checkpoint.

        Args:
            step: optimizer steps done.
            read: gives ``[n]`` elements of a parameter's weights (``"master"``) or of one of its ``MOMENTS``.
        """
        self._make_moments(step)
        for fragment in self._find_all():
            numel = fragment.master.numel()
            fragment.master.copy_(read(fragment.name, "master", fragment.start, numel))
            for key in MOMENTS:
                fragment.moments[key].copy_(read(fragment.name, key, fragment.start, numel))
        for name, weight in self._trained.items():
            self._set_weight(weight, lambda numel, name=name: read(name, "master", 0, numel))

    def destroy(self) -> None:
        """Drop hooks and buffers."""
        self._engine.destroy()

    def _whole_norm(self) -> torch.Tensor | None:
        """Without ZeRO and in float32 DeepSpeed keeps no norm."""
        gradients = [weight.grad for weight in self._trained.values() if weight.grad is not None]
        if self._optimizer is not self._adam or not gradients:
            return None
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(each.float()) for each in gradients]))

    def _find_all(self) -> Iterator[Fragment]:
        """What is on this rank, whether others have it too or not."""
        masters = self._whole_masters()
        for name, weight in self._trained.items():
            if self._stage == 0:
                yield self._cut(name, 0, masters[weight], 0, weight.numel())
                continue
            fragment = self._find_sharded(name, weight) if self._stage == 3 else self._find_partitioned(name, weight)
            if fragment is not None:
                yield fragment

    def _whole_masters(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        """Without ZeRO: what is stepped for each weight, itself in float32."""
        if self._stage or self._optimizer is self._adam:
            return {weight: weight for weight in self._trained.values()}
        groups = zip(self._optimizer.fp16_groups, self._optimizer.fp32_groups, strict=True)
        return {weight: master for lows, highs in groups for weight, master in zip(lows, highs, strict=True)}

    def _find_partitioned(self, name: str, weight: Any) -> Fragment | None:
        mapping = weight._hp_mapping
        if mapping is None:
            return None  # it lies on other ranks
        place = mapping.hp_fragment_address
        flat = self._adam.param_groups[mapping.param_group_index]["params"][0]
        return self._cut(name, mapping.lp_fragment_address.start, flat, place.start, place.numel)

    def _find_sharded(self, name: str, weight: Any) -> Fragment | None:
        optimizer = self._optimizer
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(weight)]
        start = self._rank * weight.ds_tensor.ds_numel
        size = min(size, weight.ds_numel - start)  # without what fills up the last rank's
        if size <= 0:
            return None
        return self._cut(name, start, optimizer.fp32_partitioned_groups_flat[group], offset, size)

    def _cut(self, name: str, start: int, flat: torch.Tensor, offset: int, numel: int) -> Fragment:
        state = self._adam.state.get(flat, {})
        moments = {key: state[key].detach().view(-1)[offset : offset + numel] for key in MOMENTS if key in state}
        return Fragment(name, start, flat.detach().view(-1)[offset : offset + numel], moments)

    def _flat_masters(self) -> Sequence[torch.Tensor]:
        if self._stage == 3:
            return self._optimizer.fp32_partitioned_groups_flat
        return [weight for group in self._adam.param_groups for weight in group["params"]]

    def _make_moments(self, step: int) -> None:
        """AdamW makes its states in the first step; a checkpoint has to be read into them before."""
        for flat in self._flat_masters():
            state = self._adam.state[flat]
            state["step"] = torch.tensor(float(step))
            for key in MOMENTS:
                state[key] = torch.zeros_like(flat.detach())

    def _set_weight(self, weight: Any, read: Any) -> None:
        """The weights that the module computes with, which the next step would otherwise be the first to bring up."""
        if self._stage == 3:
            with self._gathered([weight], modifier_rank=0):
                if self._rank == 0:
                    weight.data.copy_(read(weight.numel()).view(weight.shape))
        else:
            weight.data.copy_(read(weight.numel()).view(weight.shape))


class WeightSharder:
    """Cuts a model up over all ranks while it is built, for a ``DeepSpeedTraining`` of ZeRO 3. Collective.

    Args:
        config: of ZeRO 3.
        dtype: of the weights.
    """

    def __init__(self, config: DeepSpeedConfig, dtype: torch.dtype) -> None:
        deepspeed = _start_deepspeed()
        self._gathered, self._initialize = deepspeed.zero.GatheredParameters, deepspeed.zero.Init
        self._settings = {"train_micro_batch_size_per_gpu": 1, **_describe_weights(config, dtype)}
        self.is_source = dist.get_rank() == 0

    def shard(self, module: torch.nn.Module) -> None:
        """Keep this rank's part of the first rank's values of the module's own parameters."""
        own = torch.nn.ParameterList(module.parameters(recurse=False))
        if len(own):
            self._initialize(module=own, config_dict_or_path=self._settings)

    def gather(self, parameters: Iterable[torch.nn.Parameter]) -> AbstractContextManager[Any]:
        """While it is open, these parameters are whole on every rank; what the first rank makes of them stays."""
        return self._gathered(list(parameters), modifier_rank=0)


def _start_deepspeed() -> Any:
    """DeepSpeed, with its ranks those of the default group."""
    deepspeed = load_deepspeed()
    warnings.filterwarnings("ignore", r"`torch\.distributed\..*` is deprecated", FutureWarning)  # what it calls
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False)
    return deepspeed


def load_deepspeed() -> Any:
    """DeepSpeed, imported without what it would compile: an operator, for a minute; and an optimizer that nobody uses
    here, for which torch's compiler alone takes two seconds to import."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    compile_function = torch.compile
    torch.compile = _leave_as_it_is  # type: ignore[assignment]
    try:
        with redirect_stdout(io.StringIO()):  # a warning that there is no GPU
            import deepspeed
            import deepspeed.runtime.zero.muon.original_muon
    finally:
        torch.compile = compile_function
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.ERROR)
    return deepspeed


def _leave_as_it_is(function: Any = None, **_: Any) -> Any:
    return (lambda decorated: decorated) if function is None else function


def _group_by_decay(parameters: dict[str, torch.nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms and biases, which have one dimension, and embeddings do not."""
    decays: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for name, weight in parameters.items():
        num_dims = len(getattr(weight, "ds_shape", weight.shape))  # of the whole, where it is cut up already
        decays[num_dims > 1 and "embed" not in name].append(weight)
    return [
        {"params": weights, "weight_decay": weight_decay if is_decayed else 0.0}
        for is_decayed, weights in decays.items()
        if weights
    ]


def _describe(
    config: DeepSpeedConfig, optimizer: OptimizerConfig, dtype: torch.dtype, world_size: int, num_micro_steps: int
) -> dict[str, Any]:
    """DeepSpeed's own configuration."""
    # DeepSpeed adds up in bfloat16 what is not sharded
    sums = {} if config.zero_stage == 0 and dtype == torch.bfloat16 else {"grad_accum_dtype": "fp32"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": num_micro_steps,
        "train_batch_size": num_micro_steps * world_size,
        "gradient_clipping": optimizer.clip,
        "data_types": sums,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": _QUIET_STEPS,
        **_describe_weights(config, dtype),
    }


def _describe_weights(config: DeepSpeedConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Of it, what says where weights, gradients and optimizer states are."""
    element_size = dtype.itemsize
    bucket = 2 * max(1, parse_size(config.bucket_size) // (2 * element_size))  # DeepSpeed takes even numbers only
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "overlap_comm": dist.get_backend() == "nccl",
        "contiguous_gradients": True,
    }
    if config.zero_stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": config.persistence_threshold,
            "stage3_prefetch_bucket_size": max(1, parse_size(config.prefetch_size) // element_size),
        }
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.offload_params:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {"zero_optimization": zero, "bf16": {"enabled": dtype == torch.bfloat16}}
