"""``longctx plan serve``: whether every process of a deployment fits, what contexts it holds and how fast it can be.

Nothing is loaded but config.json and the headers of weights. Times are limits: what the memory and the matrix products
of a process allow; queues, networks between users and routers are left out.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cluster.config import PlanServeConfig
from longctx.attention.config import choose_method
from longctx.cli.plan_text import FILLED_SHARE, GIB, align, describe_parts
from longctx.engine.config import EngineConfig
from longctx.engine.memory_plan import ServingPlan, count_token_bytes, plan_serving_memory, prefill_flops
from longctx.errors import ConfigError
from longctx.models.checkpoint import ModelSpec, choose_context, inspect_checkpoint
from longctx.training.flops import count_linear_weights

if TYPE_CHECKING:
    from longctx.machine_limits import MachineLimits

_SHORT_CONTEXT = 1024  # shown beside the longest


def plan_serve(config: PlanServeConfig) -> int:
    """Print the plan; returns 0 if everything fits, else 1. Raises ``ConfigError``, ``CheckpointError`` as serving."""
    spec = inspect_checkpoint(config.model.path, require_weights=False)
    method = choose_method(config.attention, spec)
    if method is not None:
        raise ConfigError(
            f"attention.name={config.attention.name} is not allowed: {spec.name} would be served with {method.name} "
            "attention, and only dense attention is planned; dense, whose contexts are the shortest"
        )
    max_context = choose_context(spec, config.model.max_context)
    from longctx.machine_limits import find_limits  # loads torch: a mistake in the configuration is told before

    dtype = spec.dtype if config.model.dtype == "auto" else config.model.dtype
    num_processes = config.cluster.num_processes
    limits = find_limits(config.machine, device_name=config.model.device, dtype=dtype, num_processes=num_processes)
    if dtype == "float16" and limits.device_type == "cpu":
        dtype = "float32"  # as engines do
    deployment = _Deployment(config, spec, limits, dtype, max_context)
    sys.stdout.write("\n".join(deployment.describe()) + "\n")
    return 0 if deployment.is_good else 1


@dataclass(frozen=True, slots=True)
class _Deployment:
    config: PlanServeConfig
    spec: ModelSpec
    limits: "MachineLimits"
    dtype: str
    max_context: int

    @property
    def is_good(self) -> bool:
        """Whether everything fits and holds a whole context."""
        return all(self._fits(role) and self._holds(role) for role, _ in self._roles())

    def describe(self) -> Iterator[str]:
        """The plan as lines."""
        spec, limits = self.spec, self.limits
        yield (
            f"{spec.name} ({spec.num_parameters:,} weights, {self.dtype}) in {self.config.cluster.num_processes} "
            f"processes ({limits.device_type}), contexts of {self.max_context:,} tokens"
        )
        for role, num_workers in self._roles():
            plan = self._plan(role)
            yield ""
            yield f"{num_workers} {role} worker(s) of {self._sp_degree(role)} rank(s); each rank:"
            yield from describe_parts(plan.parts)
            verdict = "fits" if self._fits(role) else "does not fit"
            yield f"  {verdict} into {limits.memory_bytes / GIB:.1f} GiB, of which {FILLED_SHARE:.0%} may be filled"
            yield from self._describe_contexts(role, plan)
            if role == "prefill" or not self.config.cluster.num_prefill_workers:
                yield from self._describe_prefill(role)
            if role == "decode":
                yield from self._describe_decode(plan)
        if not self.is_good:
            yield ""
            yield from self._advise()

    def _roles(self) -> list[tuple[str, int]]:
        cluster = self.config.cluster
        roles = [("prefill", cluster.num_prefill_workers), ("decode", cluster.num_decode_workers)]
        return [(role, num_workers) for role, num_workers in roles if num_workers]

    def _sp_degree(self, role: str) -> int:
        return self.config.cluster.group_of(role).sp_degree

    def _plan(self, role: str, engine: EngineConfig | None = None) -> ServingPlan:
        return plan_serving_memory(
            self.spec,
            engine or self.config.engine,
            dtype=self.dtype,
            device_type=self.limits.device_type,
            memory_bytes=self.limits.memory_bytes,
            max_context=self.max_context,
            sp_degree=self._sp_degree(role),
        )

    def _fits(self, role: str) -> bool:
        return self._plan(role).total <= FILLED_SHARE * self.limits.memory_bytes

    def _holds(self, role: str) -> bool:
        return self._plan(role).num_tokens >= self.max_context

    def _room_for_kv(self, role: str) -> int:
        """Bytes of a rank that may be filled besides all else."""
        plan = self._plan(role)
        return max(0, int(FILLED_SHARE * self.limits.memory_bytes) - (plan.total - plan.parts["kv"]))

    def _describe_contexts(self, role: str, plan: ServingPlan) -> Iterator[str]:
        most = self._room_for_kv(role) // count_token_bytes(self.spec, self.dtype) * self._sp_degree(role)
        yield (
            f"  a worker holds {plan.num_tokens:,} tokens; the longest context that its memory has room for is "
            f"{most:,}, and the model takes {self.spec.max_context:,}"
        )
        if plan.num_tokens < self.max_context:
            yield f"  contexts are cut to {plan.num_tokens:,} tokens"

    def _describe_prefill(self, role: str) -> Iterator[str]:
        length, sp_degree = self.max_context, self._sp_degree(role)
        flops = prefill_flops(self.spec, length, count_linear_weights(self.spec))
        seconds = flops / sp_degree / self.limits.peak_flops
        yield f"  a prompt of {length:,} tokens takes at least {seconds:.3g} s ({length / seconds:,.0f} tokens/s)"
        if role == "prefill":
            shipped = length * count_token_bytes(self.spec, self.dtype)
            sending = shipped / sp_degree / self.config.links.bytes_per_s
            exposed = max(0.0, sending - seconds) / max(seconds, sending)
            yield (
                f"  its KV, {shipped / GIB:.3g} GiB, travels meanwhile in {sending:.3g} s: {exposed:.0%} of the time "
                "to the first token is communication alone"
            )

    def _describe_decode(self, plan: ServingPlan) -> Iterator[str]:
        rows = [("context", "sequences", "ms a token", "tokens/s")]
        for context in sorted({min(_SHORT_CONTEXT, self.max_context), self.max_context}):
            most = max(1, min(self.config.engine.max_sequences, plan.num_tokens // context))
            for num_sequences in sorted({1, most}):
                kv = num_sequences * context * count_token_bytes(self.spec, self.dtype) / self._sp_degree("decode")
                seconds = (plan.parts["weights"] + kv) / self.limits.bytes_per_s
                times = (f"{seconds * 1e3:.3g}", f"{num_sequences / seconds:,.0f}")
                rows.append((f"{context:,}", str(num_sequences), *times))
        yield "  at best:"
        yield from (f"    {line}" for line in align(rows))

    def _advise(self) -> Iterator[str]:
        """What to change."""
        room = min(self._room_for_kv(role) for role, _ in self._roles())
        if not room:
            bare = self._plan("decode", replace(self.config.engine, kv_bytes="0")).total
            smaller = "model.dtype=bfloat16, or " if self.dtype == "float32" else ""
            yield f"what would fit: {smaller}processes of more memory: all but KV takes {bare / GIB:.2f} GiB"
            return
        tokens = room // count_token_bytes(self.spec, self.dtype)
        budget = f"engine.kv_bytes={room // 2**20}MiB"
        missing = [role for role, _ in self._roles() if tokens * self._sp_degree(role) < self.max_context]
        if not missing:
            yield f"what would fit: {budget}"
            return
        ranks = -(-self.max_context // tokens)
        degrees = " ".join(f"cluster.{role}.sp_degree={ranks}" for role in missing)
        yield f"what would hold {self.max_context:,} tokens: {budget} {degrees}"
        yield f"or {budget} model.max_context={tokens}"
