"""``longctx eval``: how much of its context a model uses, measured here or at an endpoint."""

import dataclasses
import importlib.metadata
import platform
import random
import sys
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import longctx
from longctx.adapters.folder import choose_adapter
from longctx.attention.config import choose_method
from longctx.cli.eval_config import EvalCommandConfig
from longctx.cli.plan_text import align
from longctx.cli.stop_signals import ask_on_signals
from longctx.errors import ConfigError, LongctxError
from longctx.evaluation.case import Material
from longctx.evaluation.config import EvalConfig
from longctx.evaluation.haystack import FillerHaystack, Haystack, TextHaystack, load_text
from longctx.evaluation.heat_map import draw_heat_map
from longctx.evaluation.run import Evaluation, check_shortest, is_text_task
from longctx.evaluation.store import ResultStore, check_folder
from longctx.evaluation.summary import list_cells, make_grids, make_rows
from longctx.evaluation.target import Target
from longctx.evaluation.wording import STYLES
from longctx.models.checkpoint import SHIPPED, choose_context, inspect_checkpoint

EXIT_INTERRUPTED = 130
SAMPLE_CHARS = 20_000  # of the haystack, to see how many characters a token has
SECRETS = ("api_key",)
DEFAULT_MODEL = "demo"


def evaluate(config: EvalCommandConfig) -> int:
    """Run the command; returns the exit code."""
    options = config.eval
    folder = Path(options.output)
    check_folder(folder, resume=options.resume)
    scores_text = any(map(is_text_task, options.tasks))
    if options.endpoint is not None and scores_text:
        named = ", ".join(name for name in options.tasks if is_text_task(name))
        raise ConfigError(
            f"eval.tasks holds {named}, which needs log probabilities of a given text: without eval.endpoint only"
        )
    _check_shared(options)
    target = _open_endpoint(config) if options.endpoint is not None else _open_model(config)
    try:
        _check_lengths(options.lengths, target.name, target.max_context)
        text = load_text(options.text) if scores_text or options.haystack == "text" else None
        return _evaluate(options, target, text, folder)
    finally:
        target.close()


def _evaluate(options: EvalConfig, target: Target, text: TextHaystack | None, folder: Path) -> int:
    style = options.style if options.style != "auto" else "demo" if target.name in SHIPPED else "plain"
    haystack = text if options.haystack == "text" else FillerHaystack()
    assert haystack is not None
    material = _make_material(options, target, haystack, style)
    check_shortest(options, material)
    header = {
        "model": target.description,
        "versions": _list_versions(),
        "settings": {name: value for name, value in dataclasses.asdict(options).items() if name not in SECRETS},
        "style": style,
        "haystack": haystack.description,
        "text": None if text is None else text.description,
    }
    store = ResultStore(folder, header)
    text_material = None if text is None else _make_material(options, target, text, style)
    # An endpoint's requests are ended by the interrupt itself; a step of the engine is not cut in two.
    with ask_on_signals() if options.endpoint is None else nullcontext(threading.Event()) as asked:
        evaluation = Evaluation(options, target, store, material=material, text=text_material, should_stop=asked.is_set)
        return _run(evaluation, store, target)


def _run(evaluation: Evaluation, store: ResultStore, target: Target) -> int:
    try:
        evaluation.run()
    except KeyboardInterrupt:
        _conclude(store, target, is_complete=False)
        print(f"interrupted: {_say_kept(store, evaluation)}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except LongctxError as error:
        _conclude(store, target, is_complete=False)
        raise LongctxError(f"{error}; {_say_kept(store, evaluation)}") from error
    finally:
        store.close()
    _conclude(store, target, is_complete=True)
    return 0


def _open_model(config: EvalCommandConfig) -> Target:
    spec, _ = choose_adapter(config.model.adapter, inspect_checkpoint(config.model.path))
    choose_method(config.attention, spec)
    _check_lengths(config.eval.lengths, spec.name, choose_context(spec, config.model.max_context))
    _check_text(config.eval)
    from longctx.evaluation.offline import OfflineTarget  # seconds of torch, after what can be refused without it
    from longctx.llm import LLM

    llm = LLM(model_config=config.model, engine_config=config.engine, attention_config=config.attention)
    return OfflineTarget(llm, spec, chat=config.eval.chat, adapter=config.model.adapter)


def _open_endpoint(config: EvalCommandConfig) -> Target:
    from longctx.evaluation.endpoint import EndpointTarget, find_model

    options = config.eval
    assert options.endpoint is not None
    model = find_model(options.endpoint, options.model, options.api_key)
    name = model["id"]
    if options.chars_per_token is None and config.model.path == DEFAULT_MODEL and name != DEFAULT_MODEL:
        raise ConfigError(
            f"eval.endpoint={options.endpoint} serves {name}: set model.path=DIR, whose tokenizer counts tokens, or "
            "eval.chars_per_token=4 to estimate them"
        )
    _check_text(options)
    tokenizer = None
    if options.chars_per_token is None:
        from longctx.models.tokenizer import load_tokenizer

        spec = inspect_checkpoint(config.model.path, require_weights=False)
        tokenizer = load_tokenizer(spec, config.model.chat_template)
    return EndpointTarget(
        options.endpoint,
        model=model,
        api_key=options.api_key,
        tokenizer=tokenizer,
        chars_per_token=options.chars_per_token or 1.0,
        chat=options.chat,
        concurrency=options.concurrency,
        timeout_s=options.timeout_s,
    )


def _check_shared(options: EvalConfig) -> None:
    if options.share_text and len(options.depths) > options.num_distractors + 1:
        raise ConfigError(
            f"eval.share_text=true is not allowed with {len(options.depths)} eval.depths and eval.num_distractors="
            f"{options.num_distractors}: a text has one fact for each depth; eval.num_distractors="
            f"{len(options.depths) - 1} or more"
        )


def _check_text(options: EvalConfig) -> None:
    if options.text is not None:
        load_text(options.text)


def _check_lengths(lengths: Sequence[int], name: str, max_context: int | None) -> None:
    longest = max(lengths)
    if max_context is not None and longest > max_context:
        raise ConfigError(f"eval.lengths holds {longest}; {name} takes at most {max_context} tokens here")


def _make_material(options: EvalConfig, target: Target, haystack: Haystack, style: str) -> Material:
    sample = haystack.open(random.Random(0), SAMPLE_CHARS)(SAMPLE_CHARS)
    rate = len(sample) / max(target.count(sample), 1)
    return Material(options.task_options, STYLES[style], haystack, target.measure, rate)


def _conclude(store: ResultStore, target: Target, *, is_complete: bool) -> None:
    """Write results and pictures, and print the tables."""
    grids = make_grids(store.records.values())
    written = [store.finish(list_cells(grids), is_complete=is_complete)]
    for grid in grids:
        path = store.folder / f"{grid.task}.svg"
        path.write_text(draw_heat_map(grid, target.name), encoding="utf-8")
        written.append(path)
    for grid in grids:
        sys.stdout.write("\n".join(["", *align(make_rows(grid))]) + "\n")
    sys.stdout.write(f"\nresults: {', '.join(map(str, written))}\n")


def _say_kept(store: ResultStore, evaluation: Evaluation) -> str:
    kept = f"{len(store.records)} of {evaluation.num_prompts} prompts are kept in {store.folder}"
    return f"{kept}; eval.resume=true goes on"


def _list_versions() -> dict[str, str]:
    packages = ("torch", "transformers", "tokenizers")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"longctx": longctx.__version__, "python": platform.python_version()} | versions
