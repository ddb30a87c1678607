"""What the ``eval`` group of the configuration holds. No torch here."""

from collections.abc import Sequence
from dataclasses import dataclass

from longctx.evaluation.pairs import THREAD_DIRECTIONS
from longctx.evaluation.tasks import TASKS
from parallel.option import option

MAX_DEPTH = 100  # percent


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """How hard the tasks are."""

    num_distractors: int
    num_needles: int
    thread_length: int
    thread_direction: str
    num_threads: int
    num_chains: int
    shared_depths: tuple[int, ...] = ()  # where the facts stand that prompts of one text ask for; (): each has its own


def check_tasks(names: Sequence[str]) -> None:
    """Raise ``ValueError`` for an empty list, a name that is unknown or one that comes twice."""
    unknown = [name for name in names if name not in TASKS]
    if unknown or not names:
        reason = f"task {unknown[0]!r} is unknown" if unknown else "at least one task"
        raise ValueError(f"{reason}; allowed: {', '.join(TASKS)}")
    _check_different(names)


def check_lengths(lengths: Sequence[int]) -> None:
    """Raise ``ValueError`` for an empty list, a length below 1 or one that comes twice."""
    if not lengths or min(lengths) < 1:
        raise ValueError("at least one number of tokens, each at least 1")
    _check_different(lengths)


def check_depths(depths: Sequence[int]) -> None:
    """Raise ``ValueError`` for an empty list, a depth outside 0 to 100 or one that comes twice."""
    if not depths or not all(0 <= depth <= MAX_DEPTH for depth in depths):
        raise ValueError(f"at least one depth, each 0 to {MAX_DEPTH} percent")
    _check_different(depths)


def _check_different(values: Sequence[object]) -> None:
    twice = [value for value in values if values.count(value) > 1]
    if twice:
        raise ValueError(f"{twice[0]} comes twice")


@dataclass(frozen=True, slots=True)
class EvalConfig:
    """What is asked of the model, and where the answers go."""

    tasks: list[str] = option(["passkey"], f"which of {', '.join(TASKS)}", parse=check_tasks)
    lengths: list[int] = option([2048, 8192], "tokens of whole prompts", parse=check_lengths)
    depths: list[int] = option([0, 25, 50, 75, 100], "percent of the text before the answer", parse=check_depths)
    num_prompts: int = option(5, "prompts of each task, length and depth", minimum=1)
    first_prompt: int = option(0, "number of the first of them: N with num_prompts=1 repeats prompt N", minimum=0)
    seed: int = option(0, "same seed, same prompts", minimum=0)
    haystack: str = option(
        "text", "what facts are hidden in: text, or repeated filler sentences", choices=("filler", "text")
    )
    text: str | None = option(None, "file with the text; null: the sources of Python's standard library")
    style: str = option(
        "auto",
        "wording of facts and questions; demo: that of the demo model's training; auto: demo for a model named demo",
        choices=("auto", "plain", "demo"),
    )
    chat: str = option(
        "auto", "ask as a chat's user; auto: if the model has a chat template", choices=("auto", "true", "false")
    )
    num_distractors: int = option(4, "other facts of multi_key, multi_value, multi_query", minimum=0)
    share_text: bool = option(
        False,
        "multi_key: prompts that differ in depth alone ask for facts of one text, which a prefix cache computes once; "
        "eval.num_distractors + 1 depths at most",
    )
    num_needles: int = option(4, "values asked for in multi_*, multiple_needles, conditional_needles", minimum=1)
    thread_length: int = option(4, "pairs of a thread, copies of a chain in variable_tracking", minimum=1)
    thread_direction: str = option("forward", "where a thread's next pair stands", choices=THREAD_DIRECTIONS)
    num_threads: int = option(2, "threads of multi_threads", minimum=1)
    num_chains: int = option(2, "chains of variable_tracking, of which one is asked for", minimum=1)
    extra_tokens: int = option(32, "new tokens beyond those of a right answer", minimum=0)
    output: str = option("runs/eval", "folder for results and pictures")
    resume: bool = option(False, "go on with what the folder holds")
    endpoint: str | None = option(
        None, "ask this OpenAI-compatible endpoint, as http://127.0.0.1:8000/v1; null: load model.path here"
    )
    model: str | None = option(None, "the endpoint's name of the model; null: its first")
    api_key: str | None = option(None, "for the endpoint")
    concurrency: int = option(4, "requests at the endpoint at one time", minimum=1)
    timeout_s: float = option(600.0, "seconds to wait for one answer of the endpoint", above=0)
    chars_per_token: float | None = option(
        None, "for an endpoint whose tokenizer is not here: an estimate; null: model.path's tokenizer", above=0
    )

    @property
    def task_options(self) -> TaskOptions:
        """How hard the tasks are."""
        return TaskOptions(
            num_distractors=self.num_distractors,
            num_needles=self.num_needles,
            thread_length=self.thread_length,
            thread_direction=self.thread_direction,
            num_threads=self.num_threads,
            num_chains=self.num_chains,
            shared_depths=tuple(self.depths) if self.share_text else (),
        )
