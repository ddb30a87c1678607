"""Rows are found in every format, at random, with their places; what is not there or not clear is refused."""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from longctx.errors import ConfigError, DataError
from longctx.training.data import jsonl
from longctx.training.data.config import FORMATS, DataConfig
from longctx.training.data.sources import SOURCES, open_source
from tests.longctx.training.data.tokenizers_and_rows import write_lines

TEXTS = ["one", "zwei 東京", "trois 🚀\nlines", "four", "five"]
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parquet files are converted into a folder of the test's."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write_jsonl(folder: Path) -> tuple[str, list[str]]:
    first = write_lines(folder / "a.jsonl", [{"text": text} for text in TEXTS[:2]])
    second = write_lines(folder / "deeper" / "b.json", [{"text": text} for text in TEXTS[2:]])
    return str(folder), [f"{first}:1", f"{first}:2", f"{second}:1", f"{second}:2", f"{second}:3"]


def write_parquet(folder: Path) -> tuple[str, list[str]]:
    files = [folder / "a.parquet", folder / "b.parquet"]
    for file, texts in zip(files, (TEXTS[:2], TEXTS[2:]), strict=True):
        table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
        pyarrow.parquet.write_table(table, file, row_group_size=2)
    return f"{folder}/*.parquet", [f"{files[0]}#0", f"{files[0]}#1", *(f"{files[1]}#{row}" for row in range(3))]


def write_text(folder: Path) -> tuple[str, list[str]]:
    files = [folder / f"{number}.{'md' if number % 2 else 'txt'}" for number in range(len(TEXTS))]
    for file, text in zip(files, TEXTS, strict=True):
        file.write_text(text, encoding="utf-8")
    return str(folder), [str(file) for file in files]


def write_datasets(folder: Path) -> tuple[str, list[str]]:
    for name, texts in (("a", TEXTS[:2]), ("b", TEXTS[2:])):
        datasets.Dataset.from_dict({"text": texts, "other": texts}).save_to_disk(folder / name)
    return str(folder), [f"{folder}/a#0", f"{folder}/a#1", *(f"{folder}/b#{row}" for row in range(3))]


WRITERS = {"jsonl": write_jsonl, "parquet": write_parquet, "text": write_text, "datasets": write_datasets}


def test_every_format_is_tested_and_can_be_configured() -> None:
    assert {*WRITERS, "demo"} == set(SOURCES) == set(FORMATS) - {"auto"}


def test_demo_rows_are_generated() -> None:
    """The same number, the same row; facts are asked for whose answer the document holds; held-out ones differ."""
    config = DataConfig(demo_tokens=400)
    rows, again, other = (open_source(name, config) for name in ("demo", "demo", "demo-held-out"))
    read = [rows.read(row_idx) for row_idx in range(100)]
    assert read == [again.read(row_idx) for row_idx in range(100)]
    assert all(other.read(row_idx) != row for row_idx, row in enumerate(read))
    texts = [row["text"] for row in read if "text" in row]
    completions = [row for row in read if "prompt" in row]
    chats = [row["messages"] for row in read if "messages" in row]
    assert 25 < len(texts) < 55 and len(completions) > 5 and len(chats) > 20
    assert all(row["completion"].strip(" .") in row["prompt"] for row in completions)
    for chat in chats:
        answers = [message["content"] for message in chat if message["role"] == "assistant"]
        assert all(answer.removesuffix(".").split(" is ")[-1] in chat[0]["content"] for answer in answers)
    lengths = [sum(len(str(part)) for part in row.values()) for row in read]
    assert 300 < sum(lengths) / len(lengths) < 550
    assert rows.place(7) == "demo#7"


def test_demo_rows_hide_more_than_they_ask_for_and_keep_to_their_length() -> None:
    rows = open_source("demo", DataConfig(demo_tokens=480, demo_recall=1.0, demo_facts=9))
    read = [rows.read(row_idx) for row_idx in range(200)]
    chats = [row["messages"] for row in read if "messages" in row]
    assert {len(chat) for chat in chats} == {2, 4, 6, 8}  # no more than four questions
    assert all(len(row["prompt"]) + len(row["completion"]) <= 480 for row in read if "prompt" in row)
    assert all(sum(len(message["content"]) for message in chat) <= 480 for chat in chats)


def test_demo_rows_of_one_fact_ask_once() -> None:
    rows = open_source("demo", DataConfig(demo_recall=1.0, demo_facts=1))
    assert {len(row["messages"]) for row in map(rows.read, range(50)) if "messages" in row} == {2}


@pytest.mark.parametrize(("path", "chosen"), [("demo", "jsonl"), ("rows.jsonl", "demo")])
def test_demo_rows_have_a_name_and_a_format_of_their_own(path: str, chosen: str) -> None:
    with pytest.raises(ConfigError, match="is not allowed with"):
        open_source(path, DataConfig(format=chosen))


@pytest.mark.parametrize("format_name", WRITERS)
@pytest.mark.parametrize("auto", [True, False])
def test_rows_at_random_with_their_places(format_name: str, auto: bool, tmp_path: Path) -> None:
    path, places = WRITERS[format_name](tmp_path)
    (tmp_path / ".hidden.jsonl").write_text("{}")
    (tmp_path / "notes.log").write_text("not data")
    source = open_source(path, DataConfig(format="auto" if auto else format_name))
    assert len(source) == len(TEXTS)
    for row_idx in (3, 0, 4, 2, 1, 3):
        assert source.read(row_idx)["text"] == TEXTS[row_idx]
        assert source.place(row_idx) == places[row_idx]


@pytest.mark.parametrize("format_name", ["jsonl", "parquet", "datasets"])
def test_chats_of_every_format(format_name: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{format_name}"
    if format_name == "jsonl":
        write_lines(path, [{"messages": MESSAGES}])
    else:
        rows = datasets.Dataset.from_dict({"messages": [MESSAGES]})
        rows.to_parquet(path) if format_name == "parquet" else rows.save_to_disk(path)
    assert open_source(str(path), DataConfig()).read(0)["messages"] == MESSAGES


def test_lines_as_editors_and_crashes_leave_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "SCAN_BYTES", 7)
    rows = [
        b"\xef\xbb\xbf" + b'{"text": "one"}\r\n',
        b"\r\n",
        b'{"text":\t"two\\u00e9"}\n',
        b"\n",
        b"\n",
        b'{"text":"3"}',
    ]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"".join(rows))
    source = open_source(str(file), DataConfig())
    assert [source.read(row_idx)["text"] for row_idx in range(len(source))] == ["one", "twoé", "3"]
    assert [source.place(row_idx) for row_idx in range(3)] == [f"{file}:1", f"{file}:3", f"{file}:6"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "x"', "not JSON: Expecting ',' delimiter at character 13"),
        (b"  ", "not JSON: Expecting value"),
        (b'["x"]', "a JSON object is needed, not list"),
        (b'{"text": "\xff"}', "not UTF-8 text at byte 10"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_bad_lines_say_where_and_why(line: bytes, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "good"}\n\n' + line + b' \n{"text": "last"}\n')
    source = open_source(str(file), DataConfig())
    assert len(source) == 3 and source.read(2) == {"text": "last"}
    with pytest.raises(DataError) as caught:
        source.read(1)
    assert str(caught.value).startswith(f"{file}:3: ") and reason in str(caught.value)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt: not UTF-8 text at byte 2"):
        open_source(str(tmp_path), DataConfig()).read(0)


def refusal(path: str | Path | None, **options: str) -> str:
    with pytest.raises(ConfigError) as caught:
        open_source(None if path is None else str(path), DataConfig(**options), option="data.eval_path")
    return str(caught.value)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    assert refusal(None).startswith("data.eval_path is not set")
    assert refusal(tmp_path / "absent.jsonl").startswith(f"data.eval_path={tmp_path}/absent.jsonl does not exist")
    assert "has no data: no file there has a name that ends in one of .jsonl" in refusal(tmp_path)
    assert "has no data" in refusal(tmp_path / "*.parquet")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "broken.jsonl").symlink_to(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    assert refusal(tmp_path).endswith("is empty: 1 jsonl files without a row")
    assert "has nothing of data.format=text (.txt .md)" in refusal(tmp_path, format="text")
    assert "(a folder that datasets' save_to_disk wrote)" in refusal(tmp_path / "empty.jsonl", format="datasets")


def test_an_unclear_format_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", [{"text": "x"}])
    (tmp_path / "README.md").write_text("about")
    message = refusal(tmp_path)
    assert "has files of several formats: 1 jsonl, 1 text; set data.format to one of them" in message
    assert len(open_source(str(tmp_path), DataConfig(format="jsonl"))) == 1
    strange = write_lines(tmp_path / "rows.data", [{"text": "x"}])
    assert f"the name of {strange} does not say its format" in refusal(strange)
    assert len(open_source(str(strange), DataConfig(format="jsonl"))) == 1
    (tmp_path / "more.jsonl.gz").write_bytes(b"")
    assert f"{tmp_path}/more.jsonl.gz is compressed; unpack it" in refusal(tmp_path, format="jsonl")


def test_files_that_are_not_what_their_names_say(tmp_path: Path) -> None:
    (tmp_path / "array.json").write_text(json.dumps([{"text": "x"}]))
    assert "array.json: this is one JSON array; write one object a line" in refusal(tmp_path / "array.json")
    (tmp_path / "bad.parquet").write_text("no")
    assert "bad.parquet: not a Parquet file that can be read" in refusal(tmp_path / "bad.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "other.parquet")
    assert "has none of the columns text, prompt, completion, messages" in refusal(tmp_path / "other.parquet")
    assert len(open_source(str(tmp_path / "other.parquet"), DataConfig(text_key="body"))) == 1
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{")
    assert "saved: datasets cannot read the folder" in refusal(tmp_path / "saved")
    splits = datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": ["x"]}) for name in ("train", "test")})
    splits.save_to_disk(tmp_path / "splits")
    assert refusal(tmp_path / "splits").endswith(
        f"set the path to one: {tmp_path}/splits/train or {tmp_path}/splits/test"
    )
    assert len(open_source(str(tmp_path / "splits" / "train"), DataConfig())) == 1


def test_parquet_files_that_do_not_go_together(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"]}), tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": [{"deep": 1}]}), tmp_path / "b.parquet")
    assert "the Parquet files cannot be read together" in refusal(tmp_path)


def test_reading_rows_loads_no_torch() -> None:
    code = (
        "import sys; import longctx.training.data.documents, longctx.training.data.order, longctx.training.data.jsonl;"
        "import longctx.training.data.text_files, longctx.training.data.arrow; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
