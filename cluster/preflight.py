"""What can be wrong with ``longctx serve`` before anything runs, found in seconds and without Ray or torch."""

import dataclasses
import os
from pathlib import Path

import psutil

from cluster.autoscale.check import check_nodes, check_scaling
from cluster.config import ROLES, ServeConfig, ServerConfig
from cluster.key_ring import load_keys
from cluster.port import check_port
from cluster.serving import ServedModel, describe_model
from cluster.tls import check_tls
from longctx.adapters.folder import choose_adapter
from longctx.attention.config import choose_method
from longctx.errors import ConfigError
from longctx.models.checkpoint import absolute_path, inspect_checkpoint
from memory.config import TLS_FILES, TransportConfig
from memory.tls import make_context
from parallel.links import load_links
from parallel.option import parse_budget


def check(config: ServeConfig) -> tuple[ServeConfig, ServedModel]:
    """What can be wrong before anything runs. Returns the configuration as the workers get it, and the model.

    Raises ``CheckpointError`` or ``ConfigError``.
    """
    path, adapter = config.model.path, config.model.adapter
    absolute = {
        "path": absolute_path(path),
        "adapter": None if adapter is None else os.path.abspath(adapter),
    }
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **absolute))
    spec, _ = choose_adapter(config.model.adapter, inspect_checkpoint(config.model.path))
    choose_method(config.attention, spec)
    config = dataclasses.replace(config, transport=_check_transport(config), server=_check_server(config.server))
    check_scaling(config.cluster)
    check_nodes(config.cluster)
    config = _check_ranks(config)
    if config.ray.address is None:
        check_port(config.server)
        _check_memory(config)
    model = describe_model(spec, config.model)
    from longctx.models.tokenizer import load_tokenizer  # transformers takes a second: after what needs none

    load_tokenizer(spec, config.model.chat_template)
    return config, model


def _check_server(server: ServerConfig) -> ServerConfig:
    """Whether its files can be used; the endpoint, which may run in another folder, gets their absolute paths."""
    names = ("api_key_file", "tls_certificate", "tls_key")
    paths = {name: getattr(server, name) for name in names if getattr(server, name) is not None}
    for name, path in paths.items():
        if not path:
            raise ConfigError(f"server.{name}='' is not allowed: the path of a file, or null")
    load_keys(server)
    check_tls(server)
    absolute = {name: os.path.abspath(os.path.expanduser(path)) for name, path in paths.items()}
    return dataclasses.replace(server, **absolute)


def _check_transport(config: ServeConfig) -> TransportConfig:
    """Whether what lies below can be sent, and secured; workers get its files' absolute paths."""
    transport, cluster = config.transport, config.cluster
    if cluster.num_prefill_workers and config.model_of("prefill") != config.model_of("decode"):
        transport = _check_conversion(config)
    sends_memory = cluster.num_prefill_workers > 0 and transport.name in ("shared_memory", "nixl")
    if sends_memory and config.attention.blocks == "file":
        raise ConfigError(
            f"transport.name={transport.name} is not allowed with attention.blocks=file: it sends from memory alone; "
            "tcp or auto, or attention.blocks=host"
        )
    files = {name: getattr(transport, name) for name in TLS_FILES}
    absolute = {name: os.path.abspath(os.path.expanduser(path)) for name, path in files.items() if path}
    transport = dataclasses.replace(transport, **absolute)
    try:
        is_secured = make_context(transport, server_side=True) is not None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if is_secured and (cluster.prefill.sp_degree > 1 or cluster.decode.sp_degree > 1):
        raise ConfigError(
            "transport.tls_certificate is not allowed with workers of several ranks (cluster.prefill.sp_degree, "
            "cluster.decode.sp_degree): what ranks exchange among themselves is not encrypted"
        )
    return transport


def _check_conversion(config: ServeConfig) -> TransportConfig:
    """Workers of the two roles have KV of their own kinds: over what it can travel."""
    keys = "cluster.prefill and cluster.decode of another dtype or attention"
    if config.transport.name not in ("auto", "tcp"):
        raise ConfigError(
            f"transport.name={config.transport.name} is not allowed with {keys}: KV is converted by tcp alone"
        )
    if config.engine.page_size is None:
        raise ConfigError(f"engine.page_size=null is not allowed with {keys}: name one that both take, as 16")
    return dataclasses.replace(config.transport, name="tcp")


def _check_ranks(config: ServeConfig) -> ServeConfig:
    """Whether workers can have the ranks they are to have; they get the link model's absolute path."""
    cluster = config.cluster
    if cluster.prefill.sp_degree > 1 and not cluster.num_prefill_workers:
        raise ConfigError(
            f"cluster.prefill.sp_degree={cluster.prefill.sp_degree} is not allowed with cluster.num_prefill_workers=0: "
            "decode workers compute the prompts; give them ranks with cluster.decode.sp_degree"
        )
    if cluster.links_file is None:
        return config
    path = Path(cluster.links_file).absolute()
    try:
        load_links(path)
    except ValueError as error:
        raise ConfigError(f"cluster.links_file={cluster.links_file} is not allowed: {error}") from None
    return dataclasses.replace(config, cluster=dataclasses.replace(cluster, links_file=str(path)))


def _check_memory(config: ServeConfig) -> None:
    """Every worker of this machine takes its own KV pool, and what lies below it, once every pool has grown."""
    cluster, available = config.cluster, psutil.virtual_memory().available
    num_processes = {role: cluster.max_workers(role) * cluster.group_of(role).sp_degree for role in ROLES}
    budgets: dict[str, dict[str, str]] = {}  # of each process, by key and role
    if config.model.device != "cuda":
        budgets["engine.kv_bytes"] = {role: config.engine_of(role).kv_bytes for role in ROLES}
    if config.attention.blocks == "host" or (config.attention.core_fetch and config.attention.below == "host"):
        budgets["attention.blocks_bytes"] = dict.fromkeys(ROLES, config.attention.blocks_bytes)
    for key, values in budgets.items():
        total = sum((parse_budget(values[role]) or 0) * num for role, num in num_processes.items())
        if total > available:
            value = values["decode"]
            raise ConfigError(
                f"{key}={value} for each of {sum(num_processes.values())} processes is more than the "
                f"{available / 2**30:.1f} GiB of memory that are free; at most "
                f"{available // sum(num_processes.values()) // 2**20}MiB"
            )
