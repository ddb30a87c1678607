"""What the ``model`` group of the configuration holds. No torch here."""

from dataclasses import dataclass

from parallel.option import option

ATTENTION_NAMES = ("auto", "flash_attn", "torch_flash", "triton", "native", "torch")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Which checkpoint, and how it runs."""

    path: str = option("demo", "Hugging Face checkpoint folder, or a model that ships: demo, demo_landmark, demo_cca")
    adapter: str | None = option(None, "PEFT folder of an adapter trained on that checkpoint; null: none")
    name: str | None = option(None, "name clients use; null: the folder's name")
    dtype: str = option("auto", "element type of weights and KV; auto: the checkpoint's", choices=DTYPES)
    device: str = option("auto", "where it runs; auto: cuda if there is a GPU", choices=("auto", "cpu", "cuda"))
    attention: str = option("auto", "attention implementation; auto: the first that runs here", choices=ATTENTION_NAMES)
    max_context: int | None = option(
        None, "tokens of prompt and output together; null: the checkpoint's limit", minimum=1
    )
    chat_template: str | None = option(None, "file of a Jinja chat template; null: the tokenizer's own")
