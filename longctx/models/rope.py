"""Rotary embeddings of packed tokens, equal to what transformers 5.23 computes in greedy generation.

Frequencies come from transformers' own functions (``ROPE_INIT_FUNCTIONS``); this file adds what packing needs. Types
``dynamic`` and ``longrope`` depend on a sequence's length at the moment a token is computed: the prompt's length while
the prompt is computed, then the growing length. transformers keeps that in a mutable module, one sequence at a time;
here every token carries its own length, so that sequences of different lengths share a batch. Keys in the cache keep
the rotation they were stored with, as they do there.

Shape legend: T tokens, D rotary dimensions (an even number, at most the head size), F half of them, P positions,
L different lengths.
"""

from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_FIRST_POSITIONS = 4096
_MAX_CACHED_LENGTHS = 65536


class RotaryTable:
    """Cosines and sines by position.

    Args:
        config: a transformers configuration with ``rope_parameters``.
        device: where the tables live and tokens are looked up.

    Attributes:
        depends_on_length: a token's rotation depends on its sequence's length beyond ``length_threshold``; KV of one
            prompt then must not be reused for another (prefix sharing), and every lookup needs ``rope_lens_T``.
        length_threshold: lengths up to this rotate alike; None if length never matters.
        restart_length: once a sequence outgrows this many tokens its KV is computed anew, with the longer length (what
            transformers does for Phi-3); None for every other model.
    """

    def __init__(self, config: Any, *, device: torch.device | str = "cpu") -> None:
        params = config.rope_parameters
        self.rope_type: str = params["rope_type"]
        self.device = torch.device(device)
        self._config = config
        inv_freq, scaling = _default_frequencies(config) if self.rope_type == "default" else self._frequencies(None)
        self.dim = 2 * inv_freq.shape[0]
        self.attention_scaling = float(scaling)
        self.length_threshold: int | None = None
        self.restart_length: int | None = None
        self._tables = [_Table(inv_freq, self.attention_scaling, self.device)]
        self._by_length: dict[int, torch.Tensor] = {}
        if self.rope_type == "dynamic":
            self.length_threshold = int(config.max_position_embeddings)
        elif self.rope_type == "longrope":
            self.length_threshold = int(params["original_max_position_embeddings"])
            long_inv_freq = self._frequencies(self.length_threshold + 1)[0]
            self._tables.append(_Table(long_inv_freq, self.attention_scaling, self.device))
            self.restart_length = self.length_threshold if config.model_type == "phi3" else None
        self.depends_on_length = self.length_threshold is not None
        self.reserve(_FIRST_POSITIONS)

    def reserve(self, num_positions: int) -> None:
        """Make the tables cover positions below ``num_positions``; rows that are there keep their values and, if there
        are enough, their place in memory (reserve the context length before capturing a CUDA graph)."""
        for table in self._tables:
            table.reserve(num_positions)

    def lookup(
        self, positions_T: torch.Tensor, rope_lens_T: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``(cos_TD, sin_TD)`` float32, attention scaling included, both halves of D equal.

        Args:
            positions_T: int64, below the reserved number of positions.
            rope_lens_T: int64, the sequence length each token sees: at least its position + 1, for prompt tokens the
                prompt's whole length, chunked or not. Needed if ``depends_on_length``, else ignored.
        """
        cos_TD, sin_TD = self._tables[0].lookup(positions_T)
        if self.length_threshold is None:
            return cos_TD, sin_TD
        assert rope_lens_T is not None, f"rope type {self.rope_type} needs rope_lens_T"
        if self.rope_type == "longrope":
            is_long_T1 = (rope_lens_T > self.length_threshold).unsqueeze(1)
            long_cos_TD, long_sin_TD = self._tables[1].lookup(positions_T)
            return torch.where(is_long_T1, long_cos_TD, cos_TD), torch.where(is_long_T1, long_sin_TD, sin_TD)
        if not rope_lens_T.numel() or int(rope_lens_T.max()) <= self.length_threshold:
            return cos_TD, sin_TD
        return _turn(positions_T, self._frequencies_of(rope_lens_T), self.attention_scaling)

    def turn(self, positions: torch.Tensor, rope_lens_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``lookup`` without tables: float32 cosines and sines ``[*positions.shape, D]`` of any positions.

        Args:
            positions: ``[T]`` or ``[T, heads]``, whole or between tokens, on the table's device.
            rope_lens_T: see ``lookup``.
        """
        inv_freq = self._tables[0].inv_freq
        if self.length_threshold is not None and self.rope_type == "longrope":
            is_long_T1 = (rope_lens_T > self.length_threshold).unsqueeze(1)
            inv_freq = torch.where(is_long_T1, self._tables[1].inv_freq, inv_freq)
        elif self.length_threshold is not None:
            inv_freq = self._frequencies_of(rope_lens_T)
        if positions.ndim == 2 and inv_freq.ndim == 2:
            inv_freq = inv_freq.unsqueeze(1)
        return _turn(positions, inv_freq, self.attention_scaling)

    def _frequencies_of(self, rope_lens_T: torch.Tensor) -> torch.Tensor:
        """Dynamic NTK frequencies ``[T, F]`` at the lengths of tokens."""
        lengths, which_T = rope_lens_T.unique(return_inverse=True)
        if not lengths.numel():
            return self._tables[0].inv_freq.expand(0, -1)
        inv_freq_LF = torch.stack([self._frequencies_at(length) for length in lengths.tolist()]).to(self.device)
        return inv_freq_LF.index_select(0, which_T)

    def turn_between(self, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``lookup`` at positions that need not be whole numbers; at those that are, the same values."""
        assert not self.depends_on_length
        return self.turn(positions_T, positions_T)

    def _frequencies_at(self, length: int) -> torch.Tensor:
        """Dynamic NTK frequencies at one length, remembered: a decode step asks for the same few lengths."""
        length = max(length, self.length_threshold or 0)
        cached = self._by_length.get(length)
        if cached is None:
            if len(self._by_length) >= _MAX_CACHED_LENGTHS:
                self._by_length.clear()
            cached = self._by_length[length] = self._frequencies(length)[0]
        return cached

    def _frequencies(self, length: int | None) -> tuple[torch.Tensor, float]:
        # A tensor, as transformers passes it: the base is then computed in float32 rather than in Python's float64.
        seq_len: Any = None if length is None else torch.tensor(length)
        return ROPE_INIT_FUNCTIONS[self.rope_type](self._config, torch.device("cpu"), seq_len=seq_len)


class _Table:
    """Cosines and sines of one set of frequencies, grown on demand."""

    def __init__(self, inv_freq: torch.Tensor, scaling: float, device: torch.device) -> None:
        self.inv_freq = inv_freq.float().to(device)
        self._scaling = scaling
        self._cos_PD = torch.empty(0, 2 * inv_freq.shape[0], device=device)
        self._sin_PD = torch.empty_like(self._cos_PD)

    def reserve(self, num_positions: int) -> None:
        start = self._cos_PD.shape[0]
        if num_positions <= start:
            return
        stop = max(num_positions, 2 * start)
        positions = torch.arange(start, stop, device=self.inv_freq.device)
        cos_PD, sin_PD = _turn(positions, self.inv_freq, self._scaling)
        self._cos_PD = torch.cat((self._cos_PD, cos_PD))
        self._sin_PD = torch.cat((self._sin_PD, sin_PD))

    def lookup(self, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._cos_PD.index_select(0, positions_T), self._sin_PD.index_select(0, positions_T)


def _turn(positions_T: torch.Tensor, inv_freq: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines ``[T, D]`` of positions times frequencies ``[D / 2]`` or ``[T, D / 2]``; or of more dimensions
    before D."""
    angles = positions_T.unsqueeze(-1).float() * inv_freq
    angles_TD = torch.cat((angles, angles), dim=-1)
    return angles_TD.cos() * scaling, angles_TD.sin() * scaling


def _default_frequencies(config: Any) -> tuple[torch.Tensor, float]:
    """Unscaled RoPE (Su et al., 2021, section 3.2.2), which transformers defines within each model."""
    params = config.rope_parameters
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dim = int(head_dim * params.get("partial_rotary_factor", 1.0))
    return 1.0 / (params["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float) / dim)), 1.0
