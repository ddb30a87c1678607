"""Configuration: every YAML composes, every key has a comment, every mistake is named."""

import dataclasses
from itertools import product

import pytest

from longctx.cli.commands import COMMANDS, load
from longctx.config import CONFIG_FOLDER, compose, list_keys
from longctx.errors import ConfigError

ROOTS = {name: load(command.root) for name, command in COMMANDS.items()}
GROUP_OPTIONS = [
    (name, path.parent.name, path.stem)
    for name, path in product(ROOTS, sorted(CONFIG_FOLDER.glob("*/*.yaml")))
    if path.parent.name in {field.name for field in dataclasses.fields(ROOTS[name])}
]


@pytest.mark.parametrize("name", ROOTS)
def test_every_command_composes_to_its_defaults_and_yaml(name):
    config = compose(ROOTS[name], COMMANDS[name].config_name, [])
    assert type(config) is ROOTS[name]


@pytest.mark.parametrize(("name", "group", "option"), GROUP_OPTIONS)
def test_every_yaml_composes(name, group, option):
    compose(ROOTS[name], COMMANDS[name].config_name, [f"{group}={option}"])


def test_every_yaml_belongs_to_a_command():
    known = {(group, option) for _, group, option in GROUP_OPTIONS}
    assert {(path.parent.name, path.stem) for path in CONFIG_FOLDER.glob("*/*.yaml")} == known
    names = {command.config_name for command in COMMANDS.values()}
    assert {path.stem for path in CONFIG_FOLDER.glob("*.yaml")} == names


def test_every_yaml_has_a_comment():
    for path in CONFIG_FOLDER.rglob("*.yaml"):
        assert path.read_text().startswith("# "), path


@pytest.mark.parametrize("name", ROOTS)
def test_every_key_has_a_comment(name):
    for key, field in list_keys(ROOTS[name]).items():
        assert field.metadata.get("comment"), key


def test_values_are_converted():
    overrides = ["model.path=/data/7b", "engine.kv_bytes=1000000", "transport.lease_ttl_s=3", "server.api_keys=[a,1]"]
    config = compose(
        ROOTS["serve"], "serve", [*overrides, "engine.page_size=null", "ray.num_cpus=4", "cluster=colocated"]
    )
    assert (config.model.path, config.engine.kv_bytes, config.transport.lease_ttl_s) == ("/data/7b", "1000000", 3.0)
    assert (config.server.api_keys, config.engine.page_size, config.ray.num_cpus) == (["a", "1"], None, 4)
    assert config.cluster.num_prefill_workers == 0


def test_a_folder_of_ones_own(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("path: /somewhere\nmax_context: 9\n")
    config = compose(ROOTS["serve"], "serve", ["model=mine"], config_dir=tmp_path)
    assert (config.model.path, config.model.max_context) == ("/somewhere", 9)
    (tmp_path / "model" / "wrong.yaml").write_text("pth: /somewhere\n")
    with pytest.raises(ConfigError, match=r"model\.pth is unknown; did you mean model\.path"):
        compose(ROOTS["serve"], "serve", ["model=wrong"], config_dir=tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        compose(ROOTS["serve"], "serve", [], config_dir=tmp_path / "absent")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("engine.kv_byte=1GiB", ["engine.kv_byte", "engine.kv_bytes", "max_batch_tokens"]),
        ("port=9000", ["port", "server.port"]),
        ("nonsense=1", ["nonsense", "engine.*"]),
        ("server.port=http", ["server.port", "http", "at least 1 and at most 65535"]),
        ("server.port=0", ["server.port", "0", "at least 1"]),
        ("server.port=1.5", ["server.port", "1.5"]),
        ("server.port=", ["server.port"]),
        ("engine.prefix_cache=3", ["engine.prefix_cache", "true or false"]),
        ("engine.kv_bytes=lots", ["engine.kv_bytes", "lots", "GiB"]),
        ("model.dtype=int8", ["model.dtype", "int8", "bfloat16"]),
        ("model.attention=flash", ["model.attention", "flash", "native"]),
        ("transport.name=nccl", ["transport.name", "nccl", "tcp"]),
        ("transport=nccl", ["transport", "nccl", "tcp"]),
        ("cluster.prefill.sp_degree=0", ["cluster.prefill.sp_degree", "at least 1"]),
        ("cluster.prefill.plan=ring", ["cluster.prefill.plan", "ring", "token_ring", "auto"]),
        ("cluster.prefil.sp_degree=2", ["cluster.prefil.sp_degree", "cluster.prefill.sp_degree"]),
        ("cluster.policy=random", ["cluster.policy", "random", "shortest_queue"]),
        ("transport.lease_ttl_s=0", ["transport.lease_ttl_s", "above 0"]),
        ("server.api_keys=abc", ["server.api_keys", "list"]),
        ("server.port=1,2", ["server.port", "one value"]),
        ("~engine.page_size", ["engine.page_size"]),
        ("--port", ["--port", "key=value"]),
        ("model=absent", ["model=absent", "demo"]),
    ],
)
def test_mistakes_are_named(override, words):
    with pytest.raises(ConfigError) as error:
        compose(ROOTS["serve"], "serve", [override])
    for word in words:
        assert word in str(error.value)


def test_names_equal_the_registries():
    from cluster.config import POLICY_NAMES
    from cluster.policies import POLICIES
    from longctx.attention.registry import ATTENTION
    from longctx.models.config import ATTENTION_NAMES
    from memory.config import TRANSPORT_NAMES
    from memory.transport import TRANSPORTS

    assert sorted(ATTENTION_NAMES) == sorted(["auto", *ATTENTION])
    assert sorted(TRANSPORT_NAMES) == sorted(["auto", *TRANSPORTS])
    assert sorted(POLICY_NAMES) == sorted(POLICIES)


@pytest.mark.parametrize(
    "text",
    [
        "a, b, c",
        "What is 3?",
        "it's",
        'say "hi"',
        "[1,2]",
        "{a: 1}",
        "1.50",
        "true",
        "a\nb",
        "end\\",
        "a=b",
        " lead ",
        "\\'",
        "0x10",
    ],
)
def test_text_is_taken_as_it_is(text):
    assert compose(ROOTS["generate"], "generate", [f"generate.prompt={text}"]).generate.prompt == text


def test_quoted_text_loses_its_quotes():
    assert compose(ROOTS["generate"], "generate", ["generate.prompt='a, b'"]).generate.prompt == "a, b"


@pytest.mark.parametrize("value", ["auto", "true", "false"])
def test_true_and_false_among_choices(value):
    assert compose(ROOTS["generate"], "generate", [f"generate.chat={value}"]).generate.chat == value
