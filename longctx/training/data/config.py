"""What the ``data`` group of ``longctx train`` holds. No torch here."""

from dataclasses import dataclass

from parallel.option import option

FORMATS = ("auto", "jsonl", "parquet", "text", "datasets", "demo")


@dataclass(frozen=True, slots=True)
class DataConfig:
    """What is trained on, and how rows become packed sequences."""

    path: str | None = option(
        None, "file, folder or glob of files to train on, or demo for rows as the shipped models were trained on"
    )
    eval_path: str | None = option(None, "the same, to evaluate on; null: no evaluation")
    format: str = option("auto", "how rows are stored; auto: by file names", choices=FORMATS)
    text_key: str = option("text", "key of a row's text")
    prompt_key: str = option("prompt", "key of what a row asks; not trained on")
    completion_key: str = option("completion", "key of what it is answered")
    messages_key: str = option("messages", "key of a row's chat messages; assistant turns are trained on")
    chat_template: str | None = option(None, "file of a Jinja chat template; null: the tokenizer's own")
    bad_rows: str = option("fail", "what a row that cannot be read does", choices=("fail", "skip"))
    long_rows: str = option(
        "split", "what a row longer than the context does", choices=("split", "truncate", "skip", "fail")
    )
    demo_tokens: int = option(384, "tokens of a row that is generated, about (data.path=demo)", minimum=64)
    demo_recall: float = option(
        0.6, "share of generated rows that hide facts and ask for them (data.path=demo)", minimum=0, maximum=1
    )
    demo_facts: int = option(4, "facts that such a row hides at most, if they leave room", minimum=1)
    packing: bool = option(True, "several rows in one sequence, each attending only to itself")
    shuffle: bool = option(True, "rows in another order in every epoch")
    seed: int = option(0, "of the order of rows", minimum=0)
    prefetch: int = option(2, "sequences of each rank that are made ready in the background", minimum=1)
