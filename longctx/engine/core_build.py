"""What an engine with CCA attention is made of besides: pages below, attention that makes cores, a rank's part."""

from dataclasses import replace

from longctx.attention.cca_paged import CoreAttention
from longctx.attention.config import AttentionConfig
from longctx.attention.core_fetch import CoreFetch
from longctx.engine.page_place import PagePlace, make_near, make_store
from longctx.models.attention_spec import CCASpec
from longctx.models.packed import PackedDecoder
from longctx.shards.core_attention import SharedCoreAttention
from longctx.shards.group import ShardGroup
from memory.layout import KVLayout
from memory.lower_pages import LowerPages
from memory.pages import PagePool


def make_core_pages(
    attention: AttentionConfig,
    layout: KVLayout,
    num_near: int,
    place: PagePlace,
    *,
    ships: bool,
) -> tuple[PagePool, LowerPages | None]:
    """Pages near the compute, and where groups are fetched what lies below them.

    Every rank has all pages, and so room for a whole context below. With ``ships``, what lies below has places for the
    pages near, too; in host memory these are one.

    Raises:
        ConfigError: if there is no room below.
    """
    ships = ships and attention.core_fetch > 0
    near = None
    if not ships:
        near = make_near(layout, num_near, place)
        if not attention.core_fetch:
            return near, None
        place = replace(place, make_pool=None)
    num_beside = num_near if ships else 0
    store = make_store(attention, layout, place, num_tokens=place.max_context, num_beside=num_beside)
    if near is None:
        is_one = place.device.type == "cpu" and attention.below == "host"
        near = PagePool(
            layout, num_near, device=place.device, storage=store.pool.storage[:, :num_near] if is_one else None
        )
    return near, LowerPages(near, store, ships=ships)


def take_cores(
    decoder: PackedDecoder,
    method: CCASpec,
    attention: AttentionConfig,
    *,
    below: LowerPages | None,
    shards: ShardGroup | None,
) -> None:
    """Let ``decoder`` compute CCA attention, with the other ranks where there are any."""
    base, rotary = decoder.backend, decoder.rotary
    fetch = None if below is None else CoreFetch(attention.core_fetch, below)
    if shards is None:
        decoder.backend = CoreAttention(base, rotary, method, fetch=fetch)
        return
    carrier = shards.group.on_device(decoder.device)
    decoder.backend = SharedCoreAttention(base, rotary, method, carrier, timeout_s=shards.timeout_s, fetch=fetch)
