"""CCA attention over paged KV: makes cores as groups end, and attends to cores and nearest tokens (``cca.py``).

An implementation of paged attention does the work: it stores keys rotated, as always, and attends to two ranges of
keys, the cores and the tokens as they are, whose results are merged by log-sum-exp. A group is pooled from what is
stored, rotated back: so a core is the same whatever chunks its group was computed in, and a sequence has no state
besides its pages.

Shape legend: T tokens in the batch, N groups that end, g tokens of a group, M = N * g, H query heads, K KV heads,
D head dim.
"""

import torch

from longctx.attention.backend import AttentionBackend, HeadNorm, rotate
from longctx.attention.batch import AttentionShape, PackedBatch
from longctx.attention.cca import place_cores, weigh_groups
from longctx.attention.core_batch import EndingGroups
from longctx.attention.core_fetch import CoreFetch, write_bounds
from longctx.attention.outer import OuterAttention
from longctx.models.attention_spec import CCASpec
from longctx.models.rope import RotaryTable
from memory.page_rows import read_rows, write_rows
from memory.pages import PagePool
from parallel.merge import merge_partial_


class CoreAttention(OuterAttention):
    """CCA on top of any implementation; sizes of groups and windows come with each batch.

    Args:
        base: stores and attends.
        rotary: the model's, whose angles depend on positions alone.
        spec: how cores are pooled and placed.
        fetch: of groups whose cores score highest; None: no token is seen again once it has left the window.
    """

    def __init__(
        self, base: AttentionBackend, rotary: RotaryTable, spec: CCASpec, *, fetch: CoreFetch | None = None
    ) -> None:
        super().__init__(base, f"cca/{base.name}")
        self._rotary, self._spec, self._fetch = rotary, spec, fetch

    def prepare(
        self, qkv_TC: torch.Tensor, norm: HeadNorm | None, shape: AttentionShape, batch: PackedBatch
    ) -> torch.Tensor:
        """As the base class says, and makes the cores of the groups that end."""
        q_THD = self.inner.prepare(qkv_TC, norm, shape, batch)
        assert batch.cores is not None
        for groups in batch.cores.ending:
            self.pool_groups(q_THD[groups.last_rows_N], groups, shape, batch.pool)
        return q_THD

    def attend(self, q_THD: torch.Tensor, shape: AttentionShape, batch: PackedBatch) -> torch.Tensor:
        assert batch.cores is not None
        out_THD, lse_TH = self.inner.attend_ranges(q_THD, shape, batch.cores.near, batch.pool)
        if self._fetch is not None:
            self._fetch.merge_(out_THD, lse_TH, q_THD, shape, batch)
        elif batch.cores.far is not None:
            near = out_THD, lse_TH
            out_THD, lse_TH = self.inner.attend_ranges(q_THD, shape, batch.cores.far, batch.pool)
            merge_partial_(out_THD, lse_TH, *near)
        return out_THD.to(q_THD.dtype).flatten(1)

    def pool_groups(self, q_NHD: torch.Tensor, groups: EndingGroups, shape: AttentionShape, pool: PagePool) -> None:
        """Write the cores of some groups, whose tokens are stored; ``q_NHD`` are the rotated queries of their last."""
        if groups.cos_MD is None or groups.sin_MD is None:
            groups.cos_MD, groups.sin_MD = self._rotary.turn_between(groups.positions_M)
        size, cos_MD, sin_MD = groups.group_size, groups.cos_MD, groups.sin_MD
        last = slice(size - 1, None, size)
        q_NHD = rotate_back(q_NHD.float(), cos_MD[last], sin_MD[last])
        k_MKD, v_MKD = (x.float() for x in read_rows(pool, shape.layer_idx, groups.slots_M))
        k_NgKD, v_NgKD = (x.unflatten(0, (-1, size)) for x in (rotate_back(k_MKD, cos_MD, sin_MD), v_MKD))
        weights_NKg = weigh_groups(q_NHD[None], k_NgKD[None], shape.scale, head_pooling=self._spec.head_pooling)[0]
        core_k_NKD, core_v_NKD = (torch.einsum("nkg,ngkd->nkd", weights_NKg, x) for x in (k_NgKD, v_NgKD))
        positions = groups.positions_M[::size, None] + place_cores(weights_NKg, core_position=self._spec.core_position)
        cos, sin = self._rotary.turn_between(positions.expand(core_k_NKD.shape[:2]).flatten())
        turned = rotate(core_k_NKD.flatten(0, 1)[:, None], cos, sin)
        write_rows(pool, shape.layer_idx, groups.core_slots_N, turned.view_as(core_k_NKD), core_v_NKD)
        if groups.bound_slots_N is not None:
            write_bounds(pool, shape.layer_idx, groups.bound_slots_N, k_MKD.unflatten(0, (-1, size)))


def rotate_back(x_THD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
    """What ``rotate`` made ``x_THD`` of, attention scaling in cosines and sines taken out as well."""
    square_TD = cos_TD.square() + sin_TD.square()
    return rotate(x_THD, cos_TD / square_TD, -sin_TD / square_TD)
