"""Materials to make prompts from, with token counts that need no tokenizer."""

from typing import Any

from longctx.evaluation.case import Case, Cell, Material
from longctx.evaluation.config import EvalConfig
from longctx.evaluation.haystack import FillerHaystack, Haystack, TextHaystack
from longctx.evaluation.tasks import TASKS
from longctx.evaluation.wording import STYLES

TEXT = "".join(f"def function_{index}(value):\n    return value + {index}\n\n" for index in range(4000))
HAYSTACKS: dict[str, Haystack] = {"filler": FillerHaystack(), "text": TextHaystack(TEXT, "made up")}
MEASURES = {
    "bytes": (lambda prompt, lead: len((prompt + lead).encode()), 1.0),
    "coarse": (lambda prompt, lead: 11 + -(-len(prompt) // 4), 4.0),  # a chat of four characters a token
}
ASKING = [name for name in TASKS if name != "perplexity"]
WITH_DEPTH = ("multi_key", "passkey", "single_needle", "single_thread")


def make_material(*, haystack="text", style="plain", measure="bytes", **options: Any) -> Material:
    count, chars_per_token = MEASURES[measure]
    return Material(EvalConfig(**options).task_options, STYLES[style], HAYSTACKS[haystack], count, chars_per_token)


def make_cell(task: str, *, length: int = 8192, depth: int = 50, index: int = 0, seed: int = 0) -> Cell:
    return Cell(task, length, depth if task in WITH_DEPTH else None, index, seed)


def make(task: str, material: Material | None = None, **cell: int) -> Case:
    return TASKS.get(task).make(make_cell(task, **cell), material or make_material())
