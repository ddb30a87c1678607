"""What memory components say to each other across processes: frozen dataclasses without I/O."""

from dataclasses import dataclass, field

from memory.layout import KVLayout


@dataclass(frozen=True, slots=True)
class LeaseGrant:
    """A decode worker's permission to write one request's KV into its reserved pages.

    The receiver made the pages and the key; up to ``num_senders`` connections that hold the grant may push frames until
    ``ttl_s`` seconds pass without a sign of one of them or the receiver bumps the epoch.
    """

    lease_id: int  # unique within the receiver's lifetime
    epoch: int  # a frame of another epoch is refused
    request_id: str
    transport: str  # registry name
    address: str  # where the receiver listens, as the transport spells it
    pages: tuple[int, ...]  # the receiver's page ids, in sequence order, of the pages to be shipped
    page_idxs: tuple[int, ...]  # index in the sequence of each of pages, rising; others are there, or elsewhere
    num_tokens: int  # tokens of the sequence that will hold valid KV after commit
    layout: KVLayout  # of the receiver's pool
    ttl_s: float  # seconds without a valid frame of one of the senders after which the receiver frees the pages
    key: bytes = field(repr=False)  # HMAC key of this lease
    num_senders: int = 1  # connections that fill the lease together
