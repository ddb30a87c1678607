"""What ``cluster.prefill`` and ``cluster.decode`` of the configuration hold: workers of one role, and their nodes."""

from dataclasses import dataclass

from longctx.models.config import ATTENTION_NAMES, DTYPES
from parallel.option import option, parse_budget
from parallel.plans import PLANS

PLAN_NAMES = ("auto", *PLANS)
RESERVED = {"CPU": "worker_cpus", "GPU": "worker_gpus", "memory": "", "object_store_memory": ""}


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleConfig:
    """What the workers of both roles have: the nodes that they run on, and what their engines have of their own."""

    worker_cpus: float | None = option(
        None, "CPUs that Ray reserves for each of their processes; null: cluster.worker_cpus", above=0
    )
    worker_gpus: float | None = option(
        None, "GPUs that Ray gives each of their processes; null: cluster.worker_gpus", minimum=0
    )
    accelerator_type: str | None = option(
        None, "kind of GPU that their nodes have, as Ray names it: H100, A100, L4; null: any node will do"
    )
    resources: dict[str, str] = option(
        {}, "resources of your own that Ray reserves for each of their processes, as {prefill_slot:1}"
    )
    node_labels: dict[str, str] = option(
        {}, "labels that their nodes have, as {market-type:on-demand}; values as in Ray's label selectors"
    )
    rank_strategy: str = option(
        "PACK",
        "how Ray places the ranks of one worker: PACK on as few nodes as there is room on, STRICT_PACK on one node",
        choices=("PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"),
    )
    dtype: str | None = option(
        None, "element type of their weights and KV, which is converted on its way; null: model.dtype", choices=DTYPES
    )
    attention: str | None = option(
        None, "attention implementation that they run; null: model.attention", choices=ATTENTION_NAMES
    )
    kv_bytes: str | None = option(None, "KV budget of each of their ranks; null: engine.kv_bytes", parse=parse_budget)
    max_batch_tokens: int | None = option(
        None, "tokens that they compute in one step; null: engine.max_batch_tokens", minimum=16
    )
    max_sequences: int | None = option(
        None, "sequences that each decodes together at most; null: engine.max_sequences", minimum=1
    )

    def read_resources(self) -> dict[str, float]:
        """Resources of the node, besides CPUs and GPUs, that Ray is to reserve. Raises ``ValueError``."""
        found = {name: _read_amount(name, amount) for name, amount in self.resources.items()}
        if self.accelerator_type is not None:
            found[f"accelerator_type:{self.accelerator_type}"] = 0.001  # as Ray itself asks for a kind
        return found


@dataclass(frozen=True, slots=True)
class PrefillConfig(RoleConfig):
    """Each prefill worker."""

    sp_degree: int = option(1, "ranks of each prefill worker, which share every prompt's tokens", minimum=1)
    plan: str = option("auto", "how ranks exchange keys or queries of prompts", choices=PLAN_NAMES)


@dataclass(frozen=True, slots=True)
class DecodeConfig(RoleConfig):
    """Each decode worker."""

    sp_degree: int = option(
        1, "ranks of each decode worker, which share every context's KV: it holds as many times more", minimum=1
    )
    plan: str = option(
        "auto", "how ranks exchange keys or queries of prompts that are computed there", choices=PLAN_NAMES
    )


def _read_amount(name: str, amount: str) -> float:
    if name in RESERVED:
        other = RESERVED[name]
        raise ValueError(f"{name} is not one of your own" + (f": use {other}" if other else ""))
    try:
        value = float(amount)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}:{amount} is no amount above 0")
    return value
