"""API keys: what a file of them may say, that a change is noticed, and ``longctx keys``."""

import hashlib
import logging
import os
import re
from pathlib import Path

import pytest

from cluster.config import ServeConfig, ServerConfig
from cluster.key_file import read_keys
from cluster.key_ring import KeyRing, load_keys, pick_key
from cluster.preflight import check
from longctx.cli.main import main
from longctx.errors import ConfigError
from tests.cli_server import free_port

HASH = hashlib.sha256(b"lc-secret").hexdigest()


class Clock:
    """Seconds, turned by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "keys"


def run(capsys, *words: str) -> tuple[int, str, str]:
    """Exit code and what was printed."""
    code = main(["keys", *words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_a_file_of_both_kinds(path):
    path.write_text(f"# ours\n\nplain-key\n  alice:sha256:{HASH}  \nplain-key\n")
    plain, alice = read_keys(str(path))
    assert plain.text == "plain-key"
    assert re.fullmatch(r"key-[0-9a-f]{8}", plain.name)
    assert (alice.name, alice.digest.hex(), alice.text) == ("alice", HASH, "")
    assert "plain-key" not in repr(plain)
    assert HASH not in repr(alice)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (f"alice:sha256:{HASH[:-1]}\n", "line 1"),
        (f"#\nalice:sha256:{HASH.upper()}\n", "line 2"),
        (f"a b:sha256:{HASH}\n", "letters, digits"),
        (f":sha256:{HASH}\n", "NAME:sha256:HEX"),
        (f"a:sha256:{HASH}\na:sha256:{'0' * 64}\n", "line 2: 'a' is there twice"),
        (b"\xff\n", "cannot be read"),
    ],
)
def test_a_line_that_is_no_key_is_named(path, content, words):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=r"server\.api_key_file=") as caught:
        read_keys(str(path))
    assert words in str(caught.value)
    assert HASH[:-1] not in str(caught.value)  # an error is logged


def test_names_of_the_configurations_keys_are_taken(path):
    path.write_text(f"key-0:sha256:{HASH}\n")
    assert [key.name for key in load_keys(ServerConfig(api_key_file=str(path)))] == ["key-0"]
    with pytest.raises(ConfigError, match="key-0"):
        load_keys(ServerConfig(api_key_file=str(path), api_keys=["a"]))


def test_a_key_to_ask_with(path):
    path.write_text(f"alice:sha256:{HASH}\n")
    assert pick_key(ServerConfig()) is None
    assert pick_key(ServerConfig(api_key_file=str(path), api_keys=["a"])) == "a"
    with pytest.raises(ConfigError, match=r"server\.api_keys=\[KEY\]"):
        pick_key(ServerConfig(api_key_file=str(path)))


def test_the_endpoint_gets_absolute_paths(path, monkeypatch):
    """It runs in another folder."""
    path.write_text(f"alice:sha256:{HASH}\n")
    monkeypatch.chdir(path.parent)
    config, _ = check(ServeConfig(server=ServerConfig(api_key_file="keys", port=free_port())))
    assert config.server.api_key_file == str(path)
    with pytest.raises(ConfigError, match=r"server\.api_key_file='' is not allowed"):
        check(ServeConfig(server=ServerConfig(api_key_file="")))


def test_a_change_of_the_file_is_noticed(path, caplog):
    path.write_text(f"alice:sha256:{HASH}\n")
    clock = Clock()
    ring = KeyRing(ServerConfig(api_key_file=str(path), api_keys=["own"]), clock=clock)
    assert (ring.find(b"lc-secret"), ring.find(b"own"), ring.find(b"bob")) == ("alice", "key-0", None)

    def rewrite(content: str) -> None:
        path.write_text(content)
        os.utime(path, ns=(0, int(clock.now * 1e9)))

    rewrite(f"alice:sha256:{HASH}\nbob\n")
    assert ring.find(b"bob") is None  # looked at once a second
    clock.now += 1.1
    assert ring.find(b"bob") is not None
    for broken in ("alice:sha256:12\n", None):
        clock.now += 1.1
        if broken is None:
            path.unlink()
        else:
            rewrite(broken)
        caplog.clear()
        assert ring.find(b"lc-secret") == "alice"  # as it was
        clock.now += 1.1
        assert ring.find(b"lc-secret") == "alice"
        errors = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert len(errors) == 1  # not every second
        assert str(path) in errors[0].getMessage()
    clock.now += 1.1
    rewrite("# nobody\n")
    assert ring.find(b"lc-secret") is None  # revoked
    assert ring.find(b"own") == "key-0"
    assert not ring.is_open


def test_add_list_and_remove(path, capsys):
    file = f"server.api_key_file={path}"
    keys = {}
    for name in ("alice", "bob"):
        code, output, errors = run(capsys, "add", f"name={name}", file)
        assert code == 0
        assert "shown this once" in errors
        (keys[name],) = output.splitlines()
        assert re.fullmatch(r"lc-[\w-]{43}", keys[name])
        assert keys[name] not in path.read_text() + errors
        assert path.stat().st_mode & 0o777 == 0o600
    ring = KeyRing(ServerConfig(api_key_file=str(path)))
    assert {name: ring.find(key.encode()) for name, key in keys.items()} == {"alice": "alice", "bob": "bob"}
    path.write_text("# comment\n" + path.read_text())
    path.chmod(0o644)
    assert run(capsys, "list", file)[:2] == (0, "alice\nbob\n")
    assert run(capsys, "remove", "name=alice", file)[0] == 0
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text().startswith("# comment\nbob:sha256:")
    assert [each.name for each in path.parent.iterdir()] == ["keys"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("add", "name=bob"), "server.api_key_file=null is not allowed"),
        (("add", "name=bob", "FILE"), "has a key of this name"),
        (("add", "FILE"), "name=null is not allowed"),
        (("add", "name='a b'", "FILE"), "name='a b' is not allowed: up to 64 letters"),
        (
            ("add", "name=bob", "server.api_key_file=/absent/keys"),
            "server.api_key_file='/absent/keys' cannot be written",
        ),
        (("remove", "name=carol", "FILE"), "name=carol is not allowed: "),
        (("remove", "name=bob", "server.api_key_file=/absent/keys"), "no such file"),
        (("list", "server.api_key_file=/absent/keys"), "cannot be read"),
    ],
)
def test_mistakes_leave_the_file_alone(path, capsys, words, told):
    content = f"bob:sha256:{HASH}\n"
    path.write_text(content)
    code, output, errors = run(capsys, *(f"server.api_key_file={path}" if word == "FILE" else word for word in words))
    assert (code, output) == (2, "")
    assert told in errors
    assert path.read_text() == content
