"""Labels stand exactly on texts, completions and assistant turns, whatever the template and the tokenizer."""

import pytest

from longctx.errors import CheckpointError, ConfigError, DataError
from longctx.models.tokenizer import Tokenizer
from longctx.training.data import documents
from longctx.training.data.config import DataConfig
from longctx.training.data.documents import IGNORED, Document, DocumentEncoder
from tests.longctx.training.data.tokenizers_and_rows import (
    CHATML,
    LLAMA,
    MARKED,
    MOVING_SYSTEM,
    OPENED_THOUGHT,
    PLAIN,
    REASONING,
    demo_tokenizer,
    merging_tokenizer,
    metaspace_tokenizer,
    templated,
    trained_texts,
)

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 東京?"},
    {"role": "assistant", "content": "A naïve 🚀 answer."},
    {"role": "user", "content": "A naïve 🚀 answer."},
    {"role": "assistant", "content": "Yes; f(x) = 1"},
]
TOKENIZERS = {"bytes": demo_tokenizer, "merging": merging_tokenizer, "metaspace": metaspace_tokenizer}


def encode(tokenizer: Tokenizer, row: dict, config: DataConfig | None = None) -> Document:
    encoder = DocumentEncoder(config or DataConfig(), tokenizer)
    rendered = encoder.render("FILE:3", row)
    if isinstance(rendered, Document):
        return rendered
    (document,) = encoder.encode([rendered])
    if isinstance(document, DataError):
        raise document
    return document


def expected_turns(template: str) -> list[str]:
    first, second = CHAT[2]["content"], CHAT[4]["content"]
    ends = {LLAMA: "<|eot|>", OPENED_THOUGHT: "<|eot|>", PLAIN: "\n"}
    end = ends.get(template, "<|im_end|>")
    return [first + end, ("<think></think>" if template is REASONING else "") + second + end]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_text_is_trained_on_as_a_whole(name):
    tokenizer, text = TOKENIZERS[name](), " Héllo, 東京!\n\n  x"
    document = encode(tokenizer, {"text": text, "other": 1})
    ids = tokenizer.encode(text)
    assert document.ids.tolist() == [*ids, tokenizer.end_token_id]
    assert (ids[0] == 0) == (name != "bytes")  # BOS
    assert document.labels.tolist() == document.ids.tolist()
    assert document.divisible and document.place == "FILE:3"


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("What is 東京? ", "A city 🚀"),
        ("x = ", "answer"),
        ("x =", " answer"),
        ("ques", "tion"),
        ("hello", "\n\nworld\n"),
        ("line\n", "\nanswer"),
        ("", "unasked"),
        ("é", "é"),
    ],
)
def test_only_the_completion_is_trained_on(name, prompt, completion):
    tokenizer = TOKENIZERS[name]()
    document = encode(tokenizer, {"prompt": prompt, "completion": completion})
    num_prompt = int((document.labels == IGNORED).sum())
    assert (document.labels[num_prompt:] == document.ids[num_prompt:]).all()
    assert document.ids[-1] == tokenizer.end_token_id
    special = 1 if name != "bytes" else 0  # BOS is no part of the prompt's text
    decoded = [tokenizer.decode(part.tolist()) for part in (document.ids, document.ids[special:num_prompt])]
    assert decoded == [prompt + completion, prompt]
    if name != "metaspace":  # the prompt's tokens are those that are served
        assert document.ids[:num_prompt].tolist() == tokenizer.encode(prompt)
    assert not document.divisible


@pytest.mark.parametrize(
    ("name", "template"),
    [
        *(("bytes", template) for template in (CHATML, REASONING, PLAIN, MARKED)),
        *(
            (name, template)
            for name in ("merging", "metaspace")
            for template in (CHATML, LLAMA, REASONING, OPENED_THOUGHT, PLAIN, MARKED)
        ),
    ],
)
def test_only_assistant_turns_are_trained_on(name, template):
    tokenizer = templated(TOKENIZERS[name](), template)
    document = encode(tokenizer, {"messages": CHAT})
    assert document.ids.tolist() == tokenizer.encode_chat(CHAT, add_generation_prompt=False)
    turns = [text.removeprefix(" ") for text in trained_texts(tokenizer, document.ids, document.labels)]
    assert turns == expected_turns(template)


def test_the_demo_models_own_template():
    document = encode(demo_tokenizer(), {"messages": CHAT})
    assert document.ids.tolist() == demo_tokenizer().encode_chat(CHAT, add_generation_prompt=False)
    assert trained_texts(demo_tokenizer(), document.ids, document.labels) == [
        "A naïve 🚀 answer.<|im_end|>",
        "Yes; f(x) = 1<|im_end|>",
    ]


def test_reasoning_is_trained_on_where_the_template_leaves_it():
    chat = [dict(message) for message in CHAT]
    for message in (chat[2], chat[4]):
        message["content"] = "<think>A thought; Yes</think>" + message["content"]
    document = encode(templated(demo_tokenizer(), REASONING), {"messages": chat})
    assert trained_texts(demo_tokenizer(), document.ids, document.labels) == [
        "A naïve 🚀 answer.<|im_end|>",
        "<think>A thought; Yes</think>Yes; f(x) = 1<|im_end|>",
    ]


def test_a_template_that_rewrites_the_past_is_refused():
    with pytest.raises(DataError, match=r"^FILE:3: the chat template writes .* turn 3 otherwise .*data\.chat_template"):
        encode(templated(demo_tokenizer(), MOVING_SYSTEM), {"messages": CHAT})


def test_other_keys_and_empty_values_of_arrow():
    config = DataConfig(text_key="body", prompt_key="q", completion_key="a", messages_key="chat")
    assert encode(demo_tokenizer(), {"body": "ab", "text": 5, "q": None}, config).ids.tolist() == [97, 98, 256]
    document = encode(demo_tokenizer(), {"q": "a", "a": "b"}, config)
    assert document.labels.tolist() == [IGNORED, 98, 256]
    messages = [{"role": "user", "content": "a", "tool_calls": None}, {"role": "assistant", "content": "b"}]
    assert encode(demo_tokenizer(), {"chat": messages, "body": None}, config).labels.tolist()[-3:] == [98, 258, IGNORED]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "none of the keys that are trained on: 'text', 'prompt' with 'completion', or 'messages'; it has none"),
        ({"Text": "x", "prompt": "y"}, "it has 'Text', 'prompt'"),
        ({"text": None}, "it has none"),
        ({"text": 5}, "'text' must be text, not int"),
        ({"text": " \n"}, "'text' is empty"),
        ({"text": "a\ud800"}, "'text' is not valid Unicode at character 2"),
        ({"prompt": "a", "completion": ""}, "'completion' is empty"),
        ({"prompt": ["a"], "completion": "b"}, "'prompt' must be text, not list"),
        ({"messages": "hi"}, "'messages' must be a list of messages, not str"),
        ({"messages": []}, "'messages' must be a list of messages, not an empty list"),
        ({"messages": [{"from": "human", "value": "x"}]}, "message 1 of 'messages' must be an object with a 'role'"),
        ({"messages": [{"role": "user"}]}, "message 1 of 'messages' has no 'content'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no message of the role 'assistant'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "the assistant's turn comes first"),
        ({"messages": [{"role": "user", "content": "\udcff"}, CHAT[2]]}, "'messages' is not valid Unicode"),
        ({"messages": [{"role": "user", "content": 5}, CHAT[2]]}, "the chat template rejects the messages"),
    ],
)
def test_bad_rows_say_where_and_why(row, reason):
    with pytest.raises(DataError) as caught:
        encode(demo_tokenizer(), row)
    assert str(caught.value).startswith("FILE:3: ") and reason in str(caught.value)


def test_a_bad_row_among_good_ones_is_told_apart():
    encoder = DocumentEncoder(DataConfig(), templated(demo_tokenizer(), "{% generation %}{% endgeneration %}x"))
    with pytest.raises(DataError, match="FILE:9: there is nothing to train on in its 1 tokens"):
        encoder.render("FILE:9", {"messages": CHAT})


def test_chats_need_a_template_and_documents_an_end():
    plain = templated(demo_tokenizer(), CHATML)
    plain._wrapper.chat_template = None
    with pytest.raises(ConfigError, match=r"FILE:3 is a chat, but .*data\.chat_template"):
        encode(plain, {"messages": CHAT})
    endless = templated(demo_tokenizer(), CHATML)
    endless.eos_token_ids, endless._wrapper.eos_token = frozenset(), None
    with pytest.raises(CheckpointError, match="no EOS token"):
        DocumentEncoder(DataConfig(), endless)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_long_texts_are_encoded_in_slices(name, monkeypatch):
    tokenizer, text = TOKENIZERS[name](), "word 東京\n" * 40 + "x" * 50 + "\n\nend"
    whole = encode(tokenizer, {"text": text})
    monkeypatch.setattr(documents, "SLICE_CHARACTERS", 32)
    pieces = list(documents.slice_text(text))
    assert "".join(pieces) == text and max(map(len, pieces)) <= 32
    assert all(piece.endswith("\n") for piece in pieces[:10])
    sliced = encode(tokenizer, {"text": text})
    assert tokenizer.decode(sliced.ids.tolist()) == text
    assert sliced.ids[:100].tolist() == whole.ids[:100].tolist()
