"""``longctx plan attention``: what every exchange plan would move and take, and one of them step by step."""

import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from longctx.cli.plan_config import ELEMENT_SIZES, PlanAttentionConfig
from longctx.cli.plan_text import align
from longctx.errors import ConfigError
from parallel.links import LinkModel, load_links
from parallel.mask import Mask
from parallel.plan import Plan, Problem, by_step, make_problem
from parallel.planner import Candidate, pick, rank_plans
from parallel.plans import PLANS
from parallel.timeline import draw_timeline

logger = logging.getLogger(__name__)

_COLUMNS = ("plan", "forward ms", "exposed", "backward ms", "exposed", "MB sent", "busiest rank sends", "steps")


def plan_attention(config: PlanAttentionConfig) -> int:
    """Print the plans; returns the exit code. Raises ``ConfigError`` for numbers that do not go together."""
    picture = None if config.picture is None else Path(config.picture)
    if picture is not None and picture.suffix != ".svg":
        raise ConfigError(f"picture={config.picture} is not allowed: a file NAME.svg")
    try:
        links = load_links(Path(config.links_file)) if config.links_file is not None else config.links
        problem = _make_problem(config)
        candidates = rank_plans(problem, links, backward=config.backward)
        chosen = _choose(config.plan, candidates, problem)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    lines = [_describe_problem(config), _describe_links(links), ""]
    if config.steps:
        lines += [f"{chosen.plan.name}, step by step:", "", *_describe_steps(chosen.plan), ""]
    table = align([_COLUMNS, *(_describe(candidate) for candidate in candidates)])
    lines += [*table, "", f"auto takes {pick(candidates).plan.name}"]
    if picture is not None:
        schedules = [(f"{chosen.plan.name}, forward", chosen.forward)]
        if chosen.backward is not None:
            schedules.append((f"{chosen.plan.name}, backward", chosen.backward))
        try:
            picture.write_text(draw_timeline(schedules, [*lines[:2], "", *table]), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"picture={picture} cannot be written: {error.strerror}") from None
        lines.append(f"timeline: {picture}")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _make_problem(config: PlanAttentionConfig) -> Problem:
    bounds = None
    if config.documents:
        bounds = tuple(sum(config.documents[:index]) for index in range(len(config.documents) + 1))
    num_keys = config.num_cached_tokens + config.num_tokens
    if bounds is not None and bounds[-1] != num_keys:
        raise ValueError(
            f"documents={config.documents} are {bounds[-1]} tokens; num_cached_tokens + num_tokens = {num_keys}"
        )
    return make_problem(
        Mask(config.causal, config.window, bounds),
        config.num_tokens,
        num_keys,
        (config.num_heads, config.num_kv_heads, config.head_dim),
        world_size=config.world_size,
        layout=config.layout,
        batch_size=config.batch_size,
        element_size=ELEMENT_SIZES[config.dtype],
        num_nodes=config.num_nodes,
    )


def _choose(name: str, candidates: Sequence[Candidate], problem: Problem) -> Candidate:
    if name == "auto":
        return pick(candidates)
    PLANS.get(name)(problem)  # says why it cannot, if it cannot
    return next(candidate for candidate in candidates if candidate.plan.name == name)


def _describe(candidate: Candidate) -> tuple[str, ...]:
    forward, backward = candidate.forward, candidate.backward
    sent = [0] * candidate.plan.problem.world_size
    for is_backward in (False, True) if backward else (False,):
        for (source, _), num_bytes in candidate.plan.bytes_between(backward=is_backward).items():
            sent[source] += num_bytes
    return (
        candidate.plan.name,
        f"{forward.seconds * 1e3:.3f}",
        f"{forward.exposed_s * 1e3:.3f}",
        f"{backward.seconds * 1e3:.3f}" if backward else "-",
        f"{backward.exposed_s * 1e3:.3f}" if backward else "-",
        f"{candidate.num_bytes / 1e6:.3f}",
        f"{max(sent) / 1e6:.3f}",
        str(candidate.plan.num_steps),
    )


def _describe_steps(plan: Plan) -> Iterator[str]:
    """Who computes and sends what in each step of the forward."""
    works, moves, returns = by_step(plan.works), by_step(plan.moves_in(backward=False)), by_step(plan.returns())
    rows = [("step", "rank", "computes", "sends meanwhile")]
    for step in range(plan.num_steps + 1):
        for rank in range(plan.problem.world_size):
            computes = [f"q{w.q_owner} x kv{w.kv_owner}{_part(w.heads, plan)}" for w in works[step] if w.rank == rank]
            sends = [
                f"{move.kind}{move.owner}{_part(move.heads, plan)} -> {move.destination} {_size(plan.move_bytes(move))}"
                for move in moves[step]
                if move.source == rank
            ]
            sends += [
                f"out{back.owner}{_part(back.heads, plan)} -> {back.owner} {_size(plan.return_bytes(back))}"
                for back in returns[step - 1]
                if back.source == rank
            ]
            if computes or sends:
                rows.append((str(step), str(rank), ", ".join(computes) or "-", ", ".join(sends) or "-"))
    yield from align(rows)


def _part(heads: tuple[int, int], plan: Plan) -> str:
    return "" if heads == plan.problem.all_heads else f"[heads {heads[0]}:{heads[1]}]"


def _size(num_bytes: int) -> str:
    return f"({num_bytes / 1e6:.3f} MB)"


def _describe_problem(config: PlanAttentionConfig) -> str:
    words = [f"{config.num_tokens} tokens"]
    if config.num_cached_tokens:
        words.append(f"after {config.num_cached_tokens} cached")
    words.append("causal" if config.causal else "not causal")
    if config.window is not None:
        words.append(f"window {config.window}")
    if config.documents:
        words.append(f"{len(config.documents)} documents")
    words.append(f"{config.num_heads}:{config.num_kv_heads} heads x {config.head_dim}, {config.dtype}")
    words.append(f"{config.layout} over {config.world_size} ranks on {config.num_nodes} node(s)")
    return "attention: " + ", ".join(words)


def _describe_links(links: LinkModel) -> str:
    words = f"links: {links.topology}, {links.bytes_per_s / 1e9:.4g} GB/s, {links.latency_s * 1e6:.4g} us"
    if links.message_s:
        words += f", {links.message_s * 1e6:.4g} us a message"
    if links.node_bytes_per_s or links.node_latency_s:
        words += f"; between nodes {(links.node_bytes_per_s or links.bytes_per_s) / 1e9:.4g} GB/s, "
        words += f"{(links.node_latency_s or links.latency_s) * 1e6:.4g} us"
    words += f"; attention at {links.flops_per_s / 1e12:.4g} TFLOP/s a rank"
    if links.tile_s:
        words += f", {links.tile_s * 1e6:.4g} us a tile"
    return words + (
        f", {links.host_byte_s * 1e9:.4g} s less for every GB sent or received" if links.host_byte_s else ""
    )
