"""``longctx plan serve``: whether every process of a deployment fits, what contexts it holds and how fast it can be.

Nothing is loaded but config.json and the headers of weights. Times are limits: what the memory and the matrix products
of a process allow; queues, networks between users and routers are left out.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.config import PlanServeConfig
from longctx.attention.config import choose_method
from longctx.cli.plan_text import FILLED_SHARE, GIB, align, describe_parts
from longctx.engine.config import EngineConfig
from longctx.engine.context_plan import Contexts, choose_contexts, count_held, find_longest
from longctx.engine.memory_plan import ServingPlan, plan_serving_memory, prefill_flops
from longctx.models.attention_spec import AttentionSpec, LandmarkSpec
from longctx.models.checkpoint import ModelSpec, choose_context, inspect_checkpoint
from longctx.training.flops import count_linear_weights

if TYPE_CHECKING:
    from longctx.machine_limits import MachineLimits

_SHORT_CONTEXT = 1024  # shown beside the longest
_SP_DEGREES = range(2, 65)  # that are worth a try


def plan_serve(config: PlanServeConfig) -> int:
    """Print the plan; returns 0 if everything fits, else 1. Raises ``ConfigError``, ``CheckpointError`` as serving."""
    spec = inspect_checkpoint(config.model.path, require_weights=False)
    method = choose_method(config.attention, spec)
    max_context = choose_context(spec, config.model.max_context)
    from longctx.machine_limits import find_device_type, find_limits  # loads torch: mistakes are told before
    from longctx.training.peak import choose_product_dtype

    dtype = spec.dtype if config.model.dtype == "auto" else config.model.dtype
    num_processes = config.cluster.num_processes
    device_type = find_device_type(config.model.device)
    if dtype == "float16" and device_type == "cpu":
        dtype = "float32"  # as engines do
    limits = find_limits(
        config.machine,
        device_name=config.model.device,
        dtype=choose_product_dtype(dtype, device_type),
        num_processes=num_processes,
    )
    deployment = _Deployment(config, spec, method, limits, dtype, max_context)
    sys.stdout.write("\n".join(deployment.describe()) + "\n")
    return 0 if deployment.is_good else 1


@dataclass(frozen=True, slots=True)
class _Deployment:
    config: PlanServeConfig
    spec: ModelSpec
    method: AttentionSpec | None
    limits: "MachineLimits"
    dtype: str
    max_context: int

    @property
    def is_good(self) -> bool:
        """Whether everything fits and holds a whole context."""
        return all(self._fits(role) and self._holds(role) and not self._lacks_near(role) for role, _ in self._roles())

    def describe(self) -> Iterator[str]:
        """The plan as lines."""
        spec, limits = self.spec, self.limits
        attention = "" if self.method is None else f", {self.method.name} attention"
        yield (
            f"{spec.name} ({spec.num_parameters:,} weights, {self.dtype}{attention}) in "
            f"{self.config.cluster.num_processes} processes ({limits.device_type}), contexts of {self.max_context:,} "
            "tokens"
        )
        for role, num_workers in self._roles():
            plan = self._plan(role)
            yield ""
            yield f"{num_workers} {role} worker(s) of {self._sp_degree(role)} rank(s); each rank:"
            yield from describe_parts(plan.parts)
            verdict = "fits" if self._fits(role) else "does not fit"
            yield f"  {verdict} into {limits.memory_bytes / GIB:.1f} GiB, of which {FILLED_SHARE:.0%} may be filled"
            if plan.apart_bytes:
                place = "a file" if self.config.attention.below == "file" else "host memory"
                yield f"  and {plan.apart_bytes / GIB:.1f} GiB in {place}"
            if self._lacks_near(role):
                yield f"  too little is near the compute: engine.kv_bytes={self._least_near(role)} at least"
            yield from self._describe_contexts(role, plan)
            if role == "prefill" or not self.config.cluster.num_prefill_workers:
                yield from self._describe_prefill(role)
            if role == "decode":
                yield from self._describe_decode(plan)
        if not all(self._fits(role) and self._holds(role) for role, _ in self._roles()):
            yield ""
            yield from self._advise()

    def _roles(self) -> list[tuple[str, int]]:
        cluster = self.config.cluster
        roles = [("prefill", cluster.num_prefill_workers), ("decode", cluster.num_decode_workers)]
        return [(role, num_workers) for role, num_workers in roles if num_workers]

    def _sp_degree(self, role: str) -> int:
        return self.config.cluster.group_of(role).sp_degree

    def _dtype(self, role: str) -> str:
        own = self.config.cluster.group_of(role).dtype
        if own is None:
            return self.dtype
        own = self.spec.dtype if own == "auto" else own
        return "float32" if own == "float16" and self.limits.device_type == "cpu" else own

    def _contexts(self, role: str, sp_degree: int | None = None) -> Contexts:
        return choose_contexts(
            self.spec,
            self.method,
            self.config.engine_of(role),
            self.config.attention,
            dtype=self._dtype(role),
            device_type=self.limits.device_type,
            sp_degree=sp_degree or self._sp_degree(role),
        )

    def _plan(self, role: str, engine: EngineConfig | None = None) -> ServingPlan:
        return plan_serving_memory(
            self.spec,
            engine or self.config.engine_of(role),
            self.config.attention,
            self._contexts(role),
            dtype=self._dtype(role),
            device_type=self.limits.device_type,
            memory_bytes=self.limits.memory_bytes,
            max_context=self.max_context,
        )

    def _fits(self, role: str) -> bool:
        return self._plan(role).total <= FILLED_SHARE * self.limits.memory_bytes

    def _holds(self, role: str) -> bool:
        """Whether contexts are as long as somebody counts on."""
        is_wanted = self.config.model.max_context is not None or not self._is_endless
        return not is_wanted or self._find_held(role) >= self.max_context

    def _find_held(self, role: str) -> int:
        """Tokens of the longest context that the configured room holds."""
        return min(self.max_context, find_longest(self._contexts(role), self._plan(role).room))

    def _lacks_near(self, role: str) -> bool:
        return self._plan(role).parts["kv"] < self._contexts(role).count_least(self.config.engine_of(role))

    def _least_near(self, role: str) -> str:
        return f"{-(-self._contexts(role).count_least(self.config.engine_of(role)) // 2**20)}MiB"

    def _room(self, role: str) -> int:
        """Bytes of a rank that contexts may fill: all that nothing else takes."""
        plan = self._plan(role)
        taken = sum(size for part, size in plan.parts.items() if part not in self._growing(role))
        return max(0, int(FILLED_SHARE * self.limits.memory_bytes) - taken)

    def _growing(self, role: str) -> set[str]:
        """Parts of a rank's memory that grow with contexts."""
        parts = set(self._contexts(role).count_bytes(self.max_context))
        return parts - {"blocks"} if self._plan(role).apart_bytes else parts

    def _find_longest(self, role: str, sp_degree: int | None = None) -> int:
        """Tokens of the longest context that a worker's memory has room for."""
        contexts = _Together(self._contexts(role, sp_degree), self._growing(role))
        return find_longest(contexts, {"memory": self._room(role)})

    def _describe_contexts(self, role: str, plan: ServingPlan) -> Iterator[str]:
        takes = "has no limit of its own" if self._is_endless else f"takes {self.spec.max_context:,}"
        num_held, longest = count_held(self._contexts(role), plan.room, self.max_context), self._find_held(role)
        contexts = "context" if num_held == 1 else "contexts"
        yield (
            f"  a worker holds {num_held:,} {contexts} of {self.max_context:,} tokens; the longest that its memory has "
            f"room for is {self._find_longest(role):,}, and the model {takes}"
        )
        if longest < self.max_context:
            yield f"  contexts are cut to {longest:,} tokens"

    @property
    def _is_endless(self) -> bool:
        return isinstance(self.method, LandmarkSpec)

    def _describe_prefill(self, role: str) -> Iterator[str]:
        length, sp_degree, contexts = self.max_context, self._sp_degree(role), self._contexts(role)
        flops = prefill_flops(self.spec, contexts, length, count_linear_weights(self.spec))
        seconds = flops / sp_degree / self.limits.peak_flops
        yield f"  a prompt of {length:,} tokens takes at least {seconds:.3g} s ({length / seconds:,.0f} tokens/s)"
        if role == "prefill":
            shipped = contexts.count_sent(length)
            sending = shipped / sp_degree / self.config.links.bytes_per_s
            exposed = max(0.0, sending - seconds) / max(seconds, sending)
            yield (
                f"  its KV, {shipped / GIB:.3g} GiB, travels meanwhile in {sending:.3g} s: {exposed:.0%} of the time "
                "to the first token is communication alone"
            )

    def _describe_decode(self, plan: ServingPlan) -> Iterator[str]:
        rows = [("context", "sequences", "ms a token", "tokens/s")]
        contexts = self._contexts("decode")
        for context in sorted({min(_SHORT_CONTEXT, self.max_context), self.max_context}):
            most = max(1, min(self.config.engine_of("decode").max_sequences, count_held(contexts, plan.room, context)))
            for num_sequences in sorted({1, most}):
                kv = num_sequences * contexts.count_read(context) / self._sp_degree("decode")
                seconds = (plan.parts["weights"] + kv) / self.limits.bytes_per_s
                times = (f"{seconds * 1e3:.3g}", f"{num_sequences / seconds:,.0f}")
                rows.append((f"{context:,}", str(num_sequences), *times))
        yield "  at best:"
        yield from (f"    {line}" for line in align(rows))

    def _advise(self) -> Iterator[str]:
        """What to change."""
        if not min(self._room(role) for role, _ in self._roles()):
            bare = min(self._plan(role).total - self._count_growing(role) for role, _ in self._roles())
            smaller = "model.dtype=bfloat16, or " if self.dtype == "float32" else ""
            yield f"what would fit: {smaller}processes of more memory: all but KV takes {bare / GIB:.2f} GiB"
            return
        tokens = min(self.max_context, *(self._find_longest(role) for role, _ in self._roles()))
        missing = [role for role, _ in self._roles() if self._find_longest(role) < self.max_context]
        if not missing:
            yield f"what would fit: {self._budgets(self.max_context)}"
            return
        ranks = next((num for num in _SP_DEGREES if self._find_longest(missing[0], num) >= self.max_context), None)
        if ranks:
            degrees = " ".join(f"cluster.{role}.sp_degree={ranks}" for role in missing)
            yield f"what would hold {self.max_context:,} tokens: {self._budgets(tokens)} {degrees}"
        yield f"{'or' if ranks else 'what would fit:'} {self._budgets(tokens)} model.max_context={tokens}"

    def _count_growing(self, role: str) -> int:
        return sum(self._plan(role).parts[part] for part in self._growing(role))

    def _budgets(self, num_tokens: int) -> str:
        """Keys that give contexts all the room that there is, each part its share of it."""
        role = min((role for role, _ in self._roles()), key=self._room)
        needed = self._contexts(role).count_bytes(num_tokens)
        growing = self._growing(role)
        scale = self._room(role) / sum(needed[part] for part in growing)
        keys = {"kv": "engine.kv_bytes", "blocks": "attention.blocks_bytes"}
        return " ".join(f"{keys[part]}={int(needed[part] * scale) // 2**20}MiB" for part in needed if part in keys)


@dataclass(frozen=True, slots=True)
class _Together:
    """Contexts whose parts lie in one memory, as :func:`find_longest` takes them.

    Args:
        contexts: theirs.
        parts: that count.
    """

    contexts: Contexts
    parts: set[str]

    def count_bytes(self, num_tokens: int) -> Mapping[str, int]:
        needed = self.contexts.count_bytes(num_tokens)
        return {"memory": sum(needed[part] for part in self.parts)}
