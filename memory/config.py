"""What the ``transport`` group of the configuration holds. No torch here."""

from dataclasses import dataclass

from parallel.option import option, parse_size

TRANSPORT_NAMES = ("auto", "tcp", "shared_memory", "torch_distributed", "nixl", "object_store")
EVICTION_NAMES = ("lru", "lfu")
TLS_FILES = ("tls_certificate", "tls_key", "tls_ca")
CODEC_NAMES = ("none", "zstd", "bfloat16", "int8")


@dataclass(frozen=True, slots=True)
class TransportConfig:
    """How KV pages travel from prefill to decode workers."""

    name: str = option(
        "auto", "KV transport; auto: shared_memory on one host, tcp between hosts", choices=TRANSPORT_NAMES
    )
    codec: str = option(
        "none",
        "what makes KV smaller over tcp; zstd: no bit is lost; bfloat16 (of float32 KV), int8: answers may differ",
        choices=CODEC_NAMES,
    )
    tls_certificate: str | None = option(
        None, "PEM file, on every node: workers show it to each other and speak TLS over tcp; null: plain text"
    )
    tls_key: str | None = option(None, "PEM file of its key, without a passphrase")
    tls_ca: str | None = option(None, "PEM file of who signs the certificates that are believed")
    host: str | None = option(None, "address receivers listen on and advertise; null: the node's")
    frame_bytes: str = option("1MiB", "largest payload of one frame", parse=parse_size)
    lease_ttl_s: float = option(10.0, "seconds without progress after which reserved pages are freed", above=0)
    connect_timeout_s: float = option(3.0, "seconds to wait for a receiver to answer", above=0)
    send_timeout_s: float = option(5.0, "seconds one frame may take", above=0)

    def __post_init__(self) -> None:
        if self.codec != "none" and self.name not in ("auto", "tcp"):
            raise ValueError(
                f"transport.codec={self.codec} is not allowed with transport.name={self.name}: codecs are for tcp "
                "(or auto, which takes tcp between hosts)"
            )
