"""What the ``cluster``, ``server`` and ``ray`` groups of the configuration hold. Neither ray nor torch here."""

import hashlib
from dataclasses import dataclass, field, replace

from cluster.autoscale.config import AutoscaleConfig
from cluster.policies import POLICIES
from cluster.role_config import DecodeConfig, PrefillConfig
from longctx.attention.config import AttentionConfig
from longctx.engine.config import EngineConfig
from longctx.machine import MachineConfig
from longctx.models.config import ModelConfig
from memory.config import TransportConfig
from parallel.links import LinkModel
from parallel.option import option, parse_size

ROLES = ("prefill", "decode")


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """Workers and routing."""

    num_prefill_workers: int = option(1, "actors that compute prompts; 0: decode workers compute them", minimum=0)
    num_decode_workers: int = option(1, "actors that generate", minimum=1)
    prefill: PrefillConfig = field(default_factory=PrefillConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    autoscale: AutoscaleConfig = field(default_factory=AutoscaleConfig)
    worker_strategy: str = option(
        "SPREAD",
        "how Ray places workers of one rank: SPREAD over the nodes, so that the loss of one costs least; PACK: as Ray "
        "likes, which leaves nodes idle for its autoscaler to take away",
        choices=("SPREAD", "PACK"),
    )
    links_file: str | None = option(
        None, "what longctx plan links measured, for plan=auto where a worker has ranks; null: a fast switch"
    )
    local_prefill_tokens: int = option(
        512, "prompts with at most this many uncached tokens are computed where they are decoded", minimum=0
    )
    policy: str = option(
        "shortest_queue",
        "how workers are picked; splitwise also lets them do what they were not started for when queues are long",
        choices=tuple(POLICIES),
    )
    worker_cpus: float | None = option(
        None, "CPUs that Ray reserves for each process; null: the cluster's divided by the processes", above=0
    )
    worker_gpus: float | None = option(
        None, "GPUs that Ray gives each process; null: the cluster's divided by the processes, at most 1", minimum=0
    )
    heartbeat_s: float = option(0.25, "seconds between two signs of life of a worker", above=0)
    worker_timeout_s: float = option(1.5, "seconds without a sign of life after which a worker counts as lost", above=0)
    frozen_timeout_s: float = option(
        8.0, "seconds that a lost worker may be silent before its process is killed, for Ray to start it anew", above=0
    )
    call_timeout_s: float = option(
        300.0, "seconds a worker that lives may take to answer; longer than its longest step", above=0
    )
    start_timeout_s: float = option(300.0, "seconds the workers may take to load the model", above=0)
    recovery_timeout_s: float = option(
        30.0, "seconds that a request whose decode worker was lost waits for another, if there is none", minimum=0
    )

    drain_timeout_s: float = option(
        60.0, "seconds that requests may stay on a worker that drains; then they go on elsewhere", minimum=0
    )

    @property
    def num_processes(self) -> int:
        """Processes that compute: every rank of every worker."""
        return sum(self.count_workers(role) * self.group_of(role).sp_degree for role in ROLES)

    @property
    def max_processes(self) -> int:
        """The same once every pool has grown as far as it may."""
        return sum(self.max_workers(role) * self.group_of(role).sp_degree for role in ROLES)

    def count_workers(self, role: str) -> int:
        """Workers of one role at the start."""
        return self.num_prefill_workers if role == "prefill" else self.num_decode_workers

    def max_workers(self, role: str) -> int:
        """Workers of one role at most."""
        num_workers = self.count_workers(role)
        scales = self.autoscale.enabled and num_workers > 0
        return max(num_workers, self.autoscale.pool_of(role).max_workers) if scales else num_workers

    def group_of(self, role: str) -> PrefillConfig | DecodeConfig:
        """The configuration of the workers of one role."""
        return self.prefill if role == "prefill" else self.decode


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The HTTP endpoint."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on", minimum=1, maximum=65535)
    api_keys: list[str] = option(
        [],
        "keys accepted as Authorization: Bearer KEY, named key-0, key-1, ...; empty: none is asked for",
        secret=True,
    )
    api_key_file: str | None = option(
        None,
        "file of more keys, as longctx keys writes it: NAME:sha256:HEX or a key a line; read again when it changes",
    )
    key_max_requests: int = option(
        0, "requests of one key served or waiting at one time; more are answered 429; 0: no limit", minimum=0
    )
    key_requests_per_minute: int = option(
        0, "requests of one key a minute, all of them at once too; more are answered 429; 0: no limit", minimum=0
    )
    key_tokens_per_minute: int = option(
        0, "prompt tokens and tokens asked for of one key a minute; more are answered 429; 0: no limit", minimum=0
    )
    share_prefix_cache: bool = option(
        False, "keys find each other's prefixes in the cache; their timing then tells what others asked"
    )
    max_body_bytes: str = option("32MiB", "largest request body", parse=parse_size)
    max_requests: int = option(256, "requests served or waiting at one time; more are answered 429", minimum=1)
    slo_ttft_s: float | None = option(
        None,
        "seconds to the first token: fewer than max_requests are taken if that many would exceed it; null: no target",
        above=0,
    )
    slo_tpot_s: float | None = option(None, "seconds for each further token, likewise", above=0)
    slo_percentile: float = option(
        95.0, "percent of the requests that are to keep slo_ttft_s and slo_tpot_s", minimum=1, maximum=100
    )
    slo_prompt_tokens: int = option(8192, "longer prompts do not count for slo_ttft_s", minimum=1)
    request_timeout_s: float = option(
        3600.0, "seconds a request may take in all; its field timeout may say less", above=0
    )
    proxy: bool | None = option(
        None,
        "requests come through Ray Serve's HTTP proxy; false: the endpoint listens itself, on the head node; null: "
        "through the proxy if a cluster that was joined has one that listens",
    )
    standby: bool = option(
        True, "without the proxy, a second process of the endpoint stands by and takes over when the first dies"
    )
    standby_timeout_s: float = option(
        2.0, "seconds of silence after which the endpoint's process is taken for frozen, and killed", minimum=1
    )
    tls_certificate: str | None = option(
        None, "PEM file of the endpoint's certificate and its chain; with it and tls_key the endpoint speaks HTTPS"
    )
    tls_key: str | None = option(None, "PEM file of the certificate's private key, without a passphrase")
    tls_ca: str | None = option(
        None, "PEM file of the CA by which longctx status knows the endpoint; null: by tls_certificate itself"
    )


@dataclass(frozen=True, slots=True)
class RayConfig:
    """Which Ray cluster to use."""

    address: str | None = option(
        None, "address of a running cluster, or auto; null: a local Ray that stops with longctx"
    )
    num_cpus: int | None = option(None, "CPUs of the local Ray; null: this machine's", minimum=1)
    object_store_bytes: str = option(
        "256MiB", "object store of the local Ray; KV does not travel through it", parse=parse_size
    )
    namespace: str = option("longctx", "Ray namespace; two deployments in one cluster need two")
    max_restarts: int = option(
        3, "times an hour that longctx serve starts anew if its local Ray dies; 0: it ends with an error", minimum=0
    )


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """Everything ``longctx serve`` takes."""

    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig, metadata={"folder": "serve_attention"})
    transport: TransportConfig = field(default_factory=TransportConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    @property
    def digest(self) -> str:
        """Differs between deployments whose workers cannot stand in for each other."""
        parts = (self.model, self.engine, self.attention, self.transport, self.cluster)
        return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()

    def model_of(self, role: str) -> ModelConfig:
        """The model as the workers of one role run it."""
        own = self.cluster.group_of(role)
        names = [name for name in ("dtype", "attention") if getattr(own, name) is not None]
        return replace(self.model, **{name: getattr(own, name) for name in names})

    def engine_of(self, role: str) -> EngineConfig:
        """The engine of the workers of one role: what the role leaves out is everybody's."""
        own = self.cluster.group_of(role)
        names = ("kv_bytes", "max_batch_tokens", "max_sequences")
        return replace(self.engine, **{name: getattr(own, name) for name in names if getattr(own, name) is not None})


@dataclass(frozen=True, slots=True)
class PlanServeConfig(ServeConfig):
    """Everything ``longctx plan serve`` takes."""

    machine: MachineConfig = field(default_factory=MachineConfig)
    links: LinkModel = field(default_factory=LinkModel)


@dataclass(frozen=True, slots=True)
class StatusConfig:
    """Everything ``longctx status`` takes."""

    server: ServerConfig = field(default_factory=ServerConfig)
    json: bool = option(False, "print JSON instead of a table")


@dataclass(frozen=True, slots=True)
class WorkerAddConfig:
    """Everything ``longctx worker add`` takes."""

    ray: RayConfig = field(default_factory=RayConfig)
    role: str = option("decode", "what it is for", choices=("prefill", "decode"))


@dataclass(frozen=True, slots=True)
class WorkerDrainConfig:
    """Everything ``longctx worker drain`` takes."""

    ray: RayConfig = field(default_factory=RayConfig)
    name: str | None = option(None, "the worker, as longctx status shows it")
    then: str = option(
        "remove",
        "once nothing is left: remove ends it, restart starts it anew, stay leaves it; undo: it takes requests again",
        choices=("remove", "restart", "stay", "undo"),
    )
    timeout_s: float = option(600.0, "seconds to wait until it has nothing left", above=0)


@dataclass(frozen=True, slots=True)
class KeyConfig:
    """Everything ``longctx keys add`` and ``longctx keys remove`` take."""

    name: str | None = option(None, "whose key it is: up to 64 letters, digits, dots, dashes and underscores")
    server: ServerConfig = field(default_factory=ServerConfig)


@dataclass(frozen=True, slots=True)
class KeyListConfig:
    """Everything ``longctx keys list`` takes."""

    server: ServerConfig = field(default_factory=ServerConfig)


@dataclass(frozen=True, slots=True)
class PlanLinksConfig:
    """Everything ``longctx plan links`` takes."""

    ray: RayConfig = field(default_factory=RayConfig)
    world_size: int = option(4, "ranks to measure, spread over the cluster's nodes", minimum=2)
    file: str = option("links.json", "where the link model is written")


@dataclass(frozen=True, slots=True)
class SubmitConfig:
    """A job on a Ray cluster."""

    address: str | None = option(
        None, "its job server, as http://HOST:8265; null: as Ray finds it (RAY_API_SERVER_ADDRESS, or on this machine)"
    )
    id: str | None = option(None, "the job's name; null: one that Ray makes up")
    working_dir: str | None = option(None, "folder that is sent along; the job runs in a copy of it on every node")
    exclude: list[str] = option([], "files of that folder that stay here, as in .gitignore")
    pip: list[str] = option([], "packages that are installed for the job on every node")
    env_vars: dict[str, str] = option({}, "environment variables of the job on every node, as {NAME:VALUE,...}")
    python: str = option("python", "interpreter on the cluster's nodes that has longctx")
    follow: bool = option(True, "show what the job prints until it ends; Ctrl-C leaves it running")
    stop_timeout_s: int = option(
        600, "seconds that the job may take to save its state when it is stopped, before it is killed", minimum=1
    )


@dataclass(frozen=True, slots=True)
class SubmitCommandConfig:
    """Everything ``longctx submit`` takes of its own."""

    submit: SubmitConfig = field(default_factory=SubmitConfig)


@dataclass(frozen=True, slots=True)
class JobConfig:
    """Everything ``longctx job status`` and ``longctx job stop`` take."""

    id: str | None = option(None, "the job, as longctx submit printed it")
    address: str | None = option(None, "the job server, as submit.address")


@dataclass(frozen=True, slots=True)
class JobLogsConfig:
    """Everything ``longctx job logs`` takes."""

    id: str | None = option(None, "the job, as longctx submit printed it")
    address: str | None = option(None, "the job server, as submit.address")
    follow: bool = option(True, "until the job ends; false: what there is")


@dataclass(frozen=True, slots=True)
class JobListConfig:
    """Everything ``longctx job list`` takes."""

    address: str | None = option(None, "the job server, as submit.address")
