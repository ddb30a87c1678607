"""The shipped demo model: its size, its tokenizer, and a pass key found in held-out documents of 2K tokens."""

import itertools
import random

import pytest
import torch
import transformers

from longctx.models import demo_data
from longctx.models.train_demo import (
    DEMO_FOLDER,
    make_prompt,
    make_tokenizer,
    stretch_positions,
)

ODD_TEXTS = (
    "",
    "plain",
    "  leading, trailing \t\r\n\n ",
    "it's don't 123 456",
    "naïve Ω 漢字 العربية 🙂👩‍👩‍👧",
    "e\u0301 \u0000 \ufeff \ufffd \u2028 \U0010ffff",
    "".join(map(chr, range(256))),
    " .  , 's !",
    "<|im_start|>user\nx<|im_end|>\n<|endoftext|>",
)


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(DEMO_FOLDER)


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForCausalLM.from_pretrained(DEMO_FOLDER, dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module")
def held_out():
    return demo_data.load_corpora()[1]


def test_folder_is_complete_and_small():
    names = {path.name for path in DEMO_FOLDER.iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    }
    assert sum(path.stat().st_size for path in DEMO_FOLDER.iterdir()) <= 10e6


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_tokens_are_bytes_and_come_back(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert ids == demo_data.encode(text)
    assert tokenizer.decode(ids) == text


def test_bytes_that_are_not_utf8_decode_to_the_replacement_character(tokenizer):
    assert tokenizer.decode([ord("a"), 0xFF, ord("b"), 0xC3]) == "a\ufffdb\ufffd"
    assert tokenizer.decode([ord("a"), demo_data.SPECIAL_TOKENS["<|im_end|>"]], skip_special_tokens=True) == "a"


def test_shipped_tokenizer_is_the_one_the_script_makes(tokenizer):
    made = make_tokenizer()
    assert made.get_vocab() == tokenizer.get_vocab()
    assert made.chat_template == tokenizer.chat_template


def test_chat_template_gives_the_trained_form(tokenizer):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": [{"type": "text", "text": "Ho"}]}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n<|im_start|>assistant\n"


def test_held_out_files_are_not_trained_on(held_out):
    train, _ = demo_data.load_corpora()
    assert len(held_out.documents) >= 10
    assert not set(train.documents) & set(held_out.documents)


@pytest.mark.parametrize("length", [256, 2048])
def test_training_rows_are_exact_and_reproducible(length):
    corpus = demo_data.load_corpora()[0]
    for seed in range(20):
        rows = [
            demo_data.make_row(corpus, random.Random(seed), length=length, recall_share=0.6, copy_share=0.2)
            for _ in range(2)
        ]
        assert rows[0] == rows[1]
        assert len(rows[0][0]) == len(rows[0][1]) == length


@pytest.mark.parametrize("seed", range(8))
def test_hidden_fact_stands_in_the_document_at_its_depth(held_out, seed):
    rng = random.Random(seed)
    fact = demo_data.make_pass_key(rng)
    document = held_out.draw_lines(rng, 2000)
    text = "".join(span.text for span in demo_data.hide(document, [fact], [0.5], rng))
    place = text.index(fact.sentence)
    assert 1000 <= place <= 1201  # the next line or word boundary, at most 200 characters on
    assert text[:place] + text[place + len(fact.sentence) + 1 :] == document


def test_stretched_positions_ascend_within_the_maximum():
    rows = [stretch_positions(random.Random(seed), 64, max_positions=65536) for seed in range(200)]
    assert all(a < b for row in rows for a, b in itertools.pairwise(row))
    assert 60000 < max(row[-1] for row in rows) < 65536
    assert min(row[-1] for row in rows) == 63


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
@pytest.mark.parametrize("depth", [0.5, pytest.param(0.1, marks=pytest.mark.slow)])
def test_pass_key_is_found_in_held_out_documents(model, tokenizer, held_out, chat, depth):
    """Measured accuracy is on the model card; here three prompts of 2K tokens for each depth, of which one may fail."""
    rng = random.Random(f"test/{chat}/{depth}")
    found = 0
    for _ in range(3):
        prompt, answer = make_prompt(held_out, rng, num_tokens=2048, depth=depth, chat=chat)
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=32 if chat else 8, do_sample=False)
        key = "".join(filter(str.isdigit, answer))
        found += key in tokenizer.decode(output[0, inputs.input_ids.shape[1] :])
    assert found >= 2


def test_chat_prompt_is_what_the_template_makes(tokenizer, held_out):
    prompt, _ = make_prompt(held_out, random.Random(0), num_tokens=512, depth=0.5, chat=True)
    message = prompt.removeprefix("<|im_start|>user\n").removesuffix("<|im_end|>\n<|im_start|>assistant\n")
    messages = [{"role": "user", "content": message}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == prompt
