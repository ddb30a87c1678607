"""Tokenizers and data sets that the tests of training data share."""

import json
from functools import cache
from pathlib import Path

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RustTokenizer
from transformers import PreTrainedTokenizerFast

from longctx.models.checkpoint import inspect_checkpoint
from longctx.models.tokenizer import Tokenizer, load_tokenizer
from longctx.training.data.documents import IGNORED

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
# Like Qwen3: reasoning of turns that are past is left out, and the last turn always has some.
REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% if loop.last %}<think>"
    "{{ m.content.split('</think>')[0].split('<think>')[1] if '</think>' in m.content }}</think>"
    "{% endif %}{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Like DeepSeek's distilled models: the prompt opens a thought that past turns do not have.
OPENED_THOUGHT = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% else %}<|bot|>{{ m.content }}<|eot|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|bot|><think>\n{% endif %}"
)
# No special token ends a turn.
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The system's message moves into the last user's, as in some of Mistral's: beginnings are not what they will be.
MOVING_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST]"
    "{% if loop.index0 >= messages|length - 2 %}SYSTEM {% endif %}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
SPECIAL_TOKENS = ["<s>", "</s>", "<|start|>", "<|end|>", "<|eot|>", "<|user|>", "<|bot|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "The quick brown fox jumps over the lazy dog; def f(x): return x + 1\n" * 4,
    "naïve 東京 🚀 tabs\tand  spaces\n\nassistant user system hello hi there answer answers question",
    "".join(map(chr, range(32, 127))),
]


@cache
def demo_tokenizer() -> Tokenizer:
    """Bytes, and the demo model's ChatML template."""
    return load_tokenizer(inspect_checkpoint("demo"))


def templated(tokenizer: Tokenizer, template: str) -> Tokenizer:
    """``tokenizer`` with another chat template."""
    wrapper = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._rust,
        chat_template=template,
        eos_token=tokenizer._wrapper.eos_token,
        bos_token=tokenizer._wrapper.bos_token,
    )
    return Tokenizer(wrapper, eos_token_ids=tokenizer.eos_token_ids, model_name="test")


@cache
def merging_tokenizer() -> Tokenizer:
    """Byte-level BPE as Llama 3's: a token has the space before it, places leave it out, BOS goes before."""
    rust = RustTokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r" ?[^\s]+[\r\n]*|\s+"), "isolated")
    rust.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    rust.decoder = decoders.ByteLevel()
    rust.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    rust.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]),
        ]
    )
    return _wrap(rust)


@cache
def metaspace_tokenizer() -> Tokenizer:
    """BPE as Llama 2's: a space is put before each text, so that texts must not be encoded in parts."""
    rust = RustTokenizer(models.BPE(byte_fallback=True, unk_token="</s>"))
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    rust.train_from_iterator(
        [line for text in CORPUS for line in text.split()],
        trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=[chr(code) for code in range(32, 127)] + ["\n", "▁", "東", "京", "ï", "é"],
            show_progress=False,
        ),
    )
    rust.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    rust.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return _wrap(rust)


def _wrap(rust: RustTokenizer) -> Tokenizer:
    wrapper = PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>", eos_token="</s>", chat_template=LLAMA)
    return Tokenizer(wrapper, eos_token_ids=frozenset({1}), model_name="test")


def write_lines(file: Path, rows: list) -> Path:
    """JSON lines; a row that is text is written as it stands."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file


def trained_texts(tokenizer: Tokenizer, ids, labels) -> list[str]:
    """The runs of tokens that are trained on, as text."""
    runs: list[list[int]] = []
    for idx, (token_id, label) in enumerate(zip(ids, labels, strict=True)):
        if label == IGNORED:
            continue
        assert label == token_id
        if idx == 0 or labels[idx - 1] == IGNORED:
            runs.append([])
        runs[-1].append(int(token_id))
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]
