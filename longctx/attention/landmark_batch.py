"""Landmark tokens in a packed batch: they are put in as it is laid out, and nobody above the runner knows of them.

A page holds the tokens of one block, so the page of a landmark says where its key goes (``memory/landmark_keys.py``).
The token that fills a block is computed together with its landmark, in prefill and in decode: whoever finds a whole
page finds its landmark's key, too.

Positions are those inside a block: keys are stored as rotated by them, and a query is turned further by the distance
between its own block's slot and a retrieved one's (``landmark_paged.py``).

Legend: T rows of the batch with landmarks, B segments, L landmarks.
"""

import dataclasses
from dataclasses import dataclass
from itertools import pairwise

import torch

from longctx.attention.batch import KeyRanges, PackedBatch

SHORT_ROWS = 2  # rows of a segment that decodes: the token, and perhaps a landmark


@dataclass(slots=True)
class RowGroup:
    """Rows whose landmarks are scored together: a long segment's, or those of all short ones."""

    rows: torch.Tensor | slice  # of the batch
    pages: torch.Tensor  # int64 [N] of the segment's earlier blocks, or [T, N] of each row's
    block_T: torch.Tensor
    run_T: torch.Tensor


@dataclass(slots=True)
class LandmarkRows:
    """What landmark attention knows of a batch's rows. On the model's device."""

    segment_T: torch.Tensor  # int64
    block_T: torch.Tensor  # int64, of the row's own block, counted from the sequence's beginning
    run_T: torch.Tensor  # int64, equal for rows of the same block of the same segment
    own: KeyRanges  # the keys of its own block that each row sees
    landmark_rows_L: torch.Tensor  # int64, rows that are landmarks
    landmark_pages_L: torch.Tensor  # int64, their pages
    text_rows: torch.Tensor  # int64, the others
    groups: list[RowGroup]  # all rows, each in one
    num_blocks: int  # of the longest sequence, the last one included


def insert_landmarks(batch: PackedBatch, *, block_size: int, landmark_token_id: int) -> PackedBatch:
    """The batch with a landmark behind every token that fills a block.

    Args:
        batch: of text tokens, in pages of ``block_size``.
        block_size: tokens of a block, without its landmark.
        landmark_token_id: what is embedded in its place.

    Returns:
        A batch whose ``landmark`` is set. Slots of landmarks are -1: they have a key, and no place in a page.
    """
    position_T, device = batch.positions_T, batch.positions_T.device
    is_filled = position_T % block_size == block_size - 1
    num_before = is_filled.cumsum(0) - is_filled.long()
    text_rows = torch.arange(len(position_T), device=device) + num_before
    landmark_rows = text_rows[is_filled] + 1
    num_rows = len(position_T) + len(landmark_rows)

    def spread(values: torch.Tensor, landmarks: torch.Tensor | int) -> torch.Tensor:
        whole = values.new_empty(num_rows)
        whole[text_rows] = values
        whole[landmark_rows] = landmarks
        return whole

    counts = torch.cat((is_filled.new_zeros(1, dtype=torch.int64), is_filled.cumsum(0)))
    borders = batch.cu_seqlens_B1 + counts[batch.cu_seqlens_B1.long()].int()
    segment_T = torch.repeat_interleave(
        torch.arange(batch.num_segments, device=device), borders.diff().long(), output_size=num_rows
    )
    block_T = spread(position_T // block_size, position_T[is_filled] // block_size)
    offset_T = spread(position_T % block_size, block_size)
    first_T = (block_T * block_size).int()
    last_T = first_T + (offset_T + 1).clamp_max(block_size).int()
    landmark_pages = batch.block_tables_BP[segment_T[landmark_rows], block_T[landmark_rows]].long()
    num_blocks = -(-batch.max_kv_len // block_size)
    run_T = segment_T * num_blocks + block_T
    rows = LandmarkRows(
        segment_T,
        block_T,
        run_T,
        KeyRanges(borders, batch.block_tables_BP, first_T, last_T),
        landmark_rows,
        landmark_pages,
        text_rows,
        _group_rows(borders.tolist(), batch.block_tables_BP, segment_T, block_T, run_T),
        num_blocks,
    )
    return dataclasses.replace(
        batch,
        input_ids_T=spread(batch.input_ids_T, landmark_token_id),
        positions_T=offset_T,
        slots_T=spread(batch.slots_T, -1),
        cu_seqlens_B1=borders,
        logit_rows_R=text_rows[batch.logit_rows_R],
        rope_lens_T=None if batch.rope_lens_T is None else torch.full_like(offset_T, block_size + 1),
        max_q_len=int(borders.diff().max()),
        max_kv_len=block_size + 1,
        landmark=rows,
    )


def _group_rows(
    borders: list[int],
    table_BP: torch.Tensor,
    segment_T: torch.Tensor,
    block_T: torch.Tensor,
    run_T: torch.Tensor,
) -> list[RowGroup]:
    groups, short = [], []
    for segment, (start, stop) in enumerate(pairwise(borders)):
        if stop - start <= SHORT_ROWS:
            short += range(start, stop)
            continue
        rows, num_blocks = slice(start, stop), max(1, int(block_T[stop - 1]))
        groups.append(RowGroup(rows, table_BP[segment, :num_blocks].long(), block_T[rows], run_T[rows]))
    if short:
        rows = torch.tensor(short, device=block_T.device)
        num_blocks = max(1, int(block_T[rows].max()))
        pages = table_BP[segment_T[rows], :num_blocks].long()
        groups.append(RowGroup(rows, pages, block_T[rows], run_T[rows]))
    return groups
