"""Encoding and chat templates equal transformers' own; what is missing or wrong is refused with the reason."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from longctx.errors import CheckpointError, RequestError
from longctx.models.checkpoint import inspect_checkpoint
from longctx.models.tokenizer import Tokenizer, load_tokenizer
from longctx.models.train_demo import make_tokenizer
from tests.tiny_checkpoints import make_checkpoint

TEXTS = ["", "hello world", "naïve 東京 🚀\n\ttabs", "<|im_start|>user", " leading", "\x00\x7f"]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 東京?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tokenizer") / "tiny", "llama")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(inspect_checkpoint(folder))


@pytest.mark.parametrize("text", TEXTS)
def test_encode_and_decode_equal_transformers(folder: Path, tokenizer: Tokenizer, text: str) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode(text)
    assert ids == theirs.encode(text)
    for skip in (True, False):
        assert tokenizer.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_chat_equals_transformers(folder: Path, tokenizer: Tokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode_chat(CHAT)
    assert ids == theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert tokenizer.render_chat(CHAT).endswith("<|im_start|>assistant\n")
    assert not tokenizer.render_chat(CHAT, add_generation_prompt=False).endswith("<|im_start|>assistant\n")


def test_bos_is_added_as_the_checkpoint_says(folder: Path, tmp_path: Path) -> None:
    """Llama, Mistral and Gemma put BOS before a text; tokenizer.json says so. A chat template writes its own."""
    made = make_tokenizer()
    made.backend_tokenizer.post_processor = TemplateProcessing(  # type: ignore[assignment]
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 257)]
    )
    made.save_pretrained(tmp_path, save_jinja_files=False)
    for name in ("config.json", *(file.name for file in folder.glob("*.safetensors"))):
        (tmp_path / name).symlink_to(folder / name)
    tokenizer, theirs = load_tokenizer(inspect_checkpoint(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("ab") == theirs.encode("ab") == [257, 97, 98]
    assert tokenizer.encode("ab", add_special_tokens=False) == [97, 98]
    assert tokenizer.encode_chat(CHAT)[:2] == [257, ord("s")]
    assert tokenizer.decode([257, 97, 98]) == "ab"


def test_sizes_and_ends(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 260
    assert tokenizer.eos_token_ids == {256}
    assert tokenizer.decode([257]) == "" and tokenizer.decode([257], skip_special_tokens=False) == "<|im_start|>"
    assert tokenizer.decode([65, 9999]) == "A"
    assert tokenizer.decode([0xE6, 0x9D]) == "\ufffd"


def test_no_chat_template(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(inspect_checkpoint(make_checkpoint(tmp_path / "plain", "llama", chat_template=False)))
    assert tokenizer.chat_template is None
    with pytest.raises(RequestError, match="'plain' has no chat template; use /v1/completions") as caught:
        tokenizer.encode_chat(CHAT)
    assert caught.value.param == "messages"


def test_chat_template_from_a_file(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    refuse = "{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    file.write_text("{% for m in messages %}" + refuse + "[{{ m.content }}]{% endfor %}")
    tokenizer = load_tokenizer(inspect_checkpoint(folder), file)
    assert tokenizer.render_chat(CHAT) == "[Be brief.][What is 東京?]"
    with pytest.raises(RequestError, match="the chat template rejects the messages: no tools here") as caught:
        tokenizer.encode_chat([{"role": "tool", "content": "x"}])
    assert caught.value.param == "messages"
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tokenizer(inspect_checkpoint(folder), tmp_path / "absent.jinja")


FAILING = {
    "1 // value": 0,
    "range(value)": 10**9,
    "value | tojson": [],  # nested below
    "'{0}{1}'.format(value)": 1,
}


@pytest.mark.parametrize("expression", FAILING)
def test_variables_that_a_chat_template_cannot_use(folder: Path, tmp_path: Path, expression: str) -> None:
    """Whatever the template raises over what a request sets is that request's mistake."""
    file = tmp_path / "template.jinja"
    file.write_text("{{ " + expression + " }}")
    tokenizer = load_tokenizer(inspect_checkpoint(folder), file)
    value = FAILING[expression]
    if value == []:
        for _ in range(20_000):
            value = [value]
    with pytest.raises(RequestError, match="the chat template rejects the messages"):
        tokenizer.render_chat(CHAT, value=value)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "user", "content": 5}],
        ["hello"],
        [{"role": "user", "content": "\ud800"}],
    ],
)
def test_bad_messages(tokenizer: Tokenizer, messages: list) -> None:
    with pytest.raises(RequestError) as caught:
        tokenizer.encode_chat(messages)
    assert caught.value.param == "messages"


def test_invalid_unicode(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="not valid Unicode") as caught:
        tokenizer.encode("a\ud800b")
    assert caught.value.param == "prompt"


def test_far_too_long_texts_are_not_encoded_whole(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = 0
    encode = tokenizer.encode

    def watch(text: str, **options: bool) -> list[int]:
        nonlocal longest
        longest = max(longest, len(text))
        return encode(text, **options)

    monkeypatch.setattr(tokenizer, "encode", watch)
    assert tokenizer.exceeds("é" * 100_000, 100)
    assert 100 < longest < 2000
    assert not tokenizer.exceeds("x" * 500, 100)  # encoding tells


def test_missing_and_broken_files(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", "llama", tokenizer=False)
    spec = inspect_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing, and no other tokenizer file is there"):
        load_tokenizer(spec)
    (path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(CheckpointError, match="make it once from the files that are there"):
        load_tokenizer(spec)
    (path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="the tokenizer cannot be read"):
        load_tokenizer(spec)


def test_threads_share_a_tokenizer(tokenizer: Tokenizer) -> None:
    texts = [f"{i} some text 東京 " * 50 for i in range(64)]
    with ThreadPoolExecutor(8) as executor:
        assert list(executor.map(tokenizer.decode, executor.map(tokenizer.encode, texts))) == texts


def test_tokenizing_loads_no_torch(folder: Path) -> None:
    code = (
        "import sys; from longctx.models.checkpoint import inspect_checkpoint;"
        "from longctx.models.tokenizer import load_tokenizer;"
        "load_tokenizer(inspect_checkpoint(sys.argv[1])).encode_chat([{'role': 'user', 'content': 'hi'}]);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(folder)], timeout=60, check=False).returncode == 0
