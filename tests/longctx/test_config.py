"""Configuration: every YAML composes, every key has a comment, every mistake is named."""

import dataclasses

import pytest

from longctx.cli.commands import COMMANDS
from longctx.cli.sweep import expand_sweep
from longctx.config import (
    CONFIG_FOLDER,
    EXPERIMENT,
    build,
    compose,
    folder_of,
    list_keys,
    list_options,
    takes_experiments,
)
from longctx.config_text import to_yaml
from longctx.errors import ConfigError
from parallel.registry import load

ROOTS = {name: load(command.root) for name, command in COMMANDS.items()}
FLAT = CONFIG_FOLDER.parent / "docs" / "configuration"


def groups_of(name):
    """Folders of YAML by the groups of a command, ``experiment`` among them."""
    root = ROOTS[name]
    names = [field.name for field in dataclasses.fields(root) if dataclasses.is_dataclass(field.type)]
    names += [EXPERIMENT] if takes_experiments(COMMANDS[name].config_name) else []
    return {group: folder_of(root, group) for group in names}


GROUP_OPTIONS = [
    (name, group, option)
    for name in ROOTS
    for group, folder in groups_of(name).items()
    for option in list_options(folder, [CONFIG_FOLDER])
]


@pytest.mark.parametrize("name", ROOTS)
def test_every_command_composes_to_its_defaults_and_yaml(name):
    config = compose(ROOTS[name], COMMANDS[name].config_name, [])
    assert type(config) is ROOTS[name]


@pytest.mark.parametrize(("name", "group", "option"), GROUP_OPTIONS)
def test_every_yaml_composes(name, group, option):
    compose(ROOTS[name], COMMANDS[name].config_name, [f"{group}={option}"])


def test_every_yaml_belongs_to_a_command():
    known = {(groups_of(name)[group], option) for name, group, option in GROUP_OPTIONS}
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
        ("server.key_max_requests=-1", ["server.key_max_requests", "-1", "at least 0"]),
        ("server.key_requests_per_minute=1.5", ["server.key_requests_per_minute", "1.5"]),
        ("server.key_tokens_per_minute=-5", ["server.key_tokens_per_minute", "-5", "at least 0"]),
        ("server.share_prefix_cache=maybe", ["server.share_prefix_cache", "true or false"]),
        ("server.tls_cert=a.pem", ["server.tls_cert", "server.tls_certificate"]),
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
    from longctx.attention.registry import ATTENTION
    from longctx.models.config import ATTENTION_NAMES
    from memory.config import EVICTION_NAMES, TRANSPORT_NAMES
    from memory.eviction import EVICTIONS
    from memory.transport import TRANSPORTS

    assert sorted(ATTENTION_NAMES) == sorted(["auto", *ATTENTION])
    assert sorted(EVICTION_NAMES) == sorted(EVICTIONS)
    assert sorted(TRANSPORT_NAMES) == sorted(["auto", *TRANSPORTS])


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


def compose_train(*overrides, config_dir=None):
    return compose(ROOTS["train"], "train", list(overrides), config_dir=config_dir)


def test_two_commands_have_groups_of_one_name():
    """``model`` and ``cluster`` of ``serve`` and ``train`` have other keys, and other options."""
    config = compose_train("cluster=ray", "model=random", "deepspeed=zero3_offload")
    assert (config.cluster.launcher, config.cluster.address, config.model.init) == ("ray", "auto", "random")
    assert (config.deepspeed.zero_stage, config.deepspeed.offload_params) == (3, True)
    with pytest.raises(ConfigError, match="cluster=colocated is not allowed; allowed for cluster: local"):
        compose_train("cluster=colocated")
    with pytest.raises(ConfigError, match="cluster=ray is not allowed; allowed for cluster: colocated"):
        compose(ROOTS["serve"], "serve", ["cluster=ray"])


def test_an_experiment_sets_keys_of_several_groups(tmp_path):
    config = compose_train("experiment=context_extension")
    assert (config.parallel.sp_degree, config.deepspeed.zero_stage, config.train.context_length) == (4, 3, 32768)
    config = compose_train("parallel=mixed", "train.context_length=4096", "experiment=context_extension")
    assert (config.parallel.dp_degree, config.train.context_length) == (2, 4096)  # what is typed comes last
    (tmp_path / "experiment").mkdir()
    mine = tmp_path / "experiment" / "mine.yaml"
    mine.write_text(
        "# @package _global_\ndefaults:\n  - override /optimizer: wsd\noutput: there\nmodel:\n  path: /my\n"
    )
    config = compose_train("experiment=mine", config_dir=tmp_path)
    assert (config.output, config.model.path, config.optimizer.schedule) == ("there", "/my", "wsd")
    with pytest.raises(ConfigError, match=r"experiment=min is not allowed; allowed .*: .*context_extension, .*mine, "):
        compose_train("experiment=min", config_dir=tmp_path)
    mine.write_text("model:\n  path: /my\n")
    with pytest.raises(ConfigError, match="begins with # @package _global_"):
        compose_train("experiment=mine", config_dir=tmp_path)
    mine.write_text("# @package _global_\nmodel:\n  pth: /my\n")
    with pytest.raises(ConfigError, match=r"model\.pth is unknown; did you mean model\.path"):
        compose_train("experiment=mine", config_dir=tmp_path)
    with pytest.raises(ConfigError, match="experiment is unknown"):
        compose(ROOTS["serve"], "serve", ["experiment=mine"], config_dir=tmp_path)


def test_the_flattened_defaults_are_committed():
    """``longctx train --cfg job > docs/configuration/train.yaml`` writes them anew."""
    assert (FLAT / "train.yaml").read_text() == to_yaml(compose_train())


@pytest.mark.parametrize("name", ROOTS)
def test_what_is_printed_composes_to_itself(tmp_path, name):
    """The text of ``--cfg job``, with comments, is a configuration again."""
    overrides = {"generate": ["generate.prompt=it's [1, 2]: #3", "generate.stop=[a,'true']"]}.get(name, [])
    config = compose(ROOTS[name], COMMANDS[name].config_name, overrides)
    text = to_yaml(config)
    assert all(f"  # {field.metadata['comment']}" in text for field in list_keys(ROOTS[name]).values())
    if takes_experiments(COMMANDS[name].config_name):
        (tmp_path / "experiment").mkdir()
        (tmp_path / "experiment" / "again.yaml").write_text(f"# @package _global_\n{text}")
        words = ["experiment=again", "train.seed=0"]
        assert compose(ROOTS[name], COMMANDS[name].config_name, words, config_dir=tmp_path) == config
    else:
        from omegaconf import OmegaConf

        assert build(ROOTS[name], OmegaConf.to_container(OmegaConf.create(text)), "") == config


def test_sweeps_are_expanded():
    runs = expand_sweep(["optimizer=cosine,wsd", "train.seed=3", "optimizer.lr=1e-4,2e-4", "model.path='a,b'"])
    assert [run.swept for run in runs] == [
        ("optimizer=cosine", "optimizer.lr=0.0001"),
        ("optimizer=cosine", "optimizer.lr=0.0002"),
        ("optimizer=wsd", "optimizer.lr=0.0001"),
        ("optimizer=wsd", "optimizer.lr=0.0002"),
    ]
    assert [compose_train(*run.overrides).optimizer.lr for run in runs] == [1e-4, 2e-4, 1e-4, 2e-4]
    assert {compose_train(*run.overrides).model.path for run in runs} == {"a,b"}
    assert [run.swept for run in expand_sweep(["train.seed=range(1,3)"])] == [("train.seed=1",), ("train.seed=2",)]
    for overrides, words in ((["train.seed=1"], "there is none"), (["optimizer.lr=interval(0,1)"], "list the values")):
        with pytest.raises(ConfigError, match=words):
            expand_sweep(overrides)
