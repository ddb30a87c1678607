"""A transformers model whose attention is ``longctx.cca_attention``: what the engine under CCA is compared with."""

from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AutoModelForCausalLM

import longctx
from longctx.messages import TokenLogprob
from longctx.models.attention_spec import CCASpec
from tests.longctx.methods.cca_reference import cca_reference


def _attend(module: Any, query: Any, key: Any, value: Any, *_: Any, scaling: float, **__: Any) -> Any:
    spec, turn = module.cca_spec, module.cca_rope
    qkv = [x.transpose(1, 2) for x in (query, key, value)]
    options = {
        "group_size": spec.group_size,
        "window": spec.window,
        "scale": scaling,
        "core_position": spec.core_position,
        "head_pooling": spec.head_pooling,
    }
    if module.core_fetch:
        fetched, bounds = {"core_fetch": module.core_fetch}, (0, query.shape[2])
        one = lambda x, place: turn(x[None, None, None], torch.as_tensor(place)[None, None])[0, 0, 0]  # noqa: E731
        return cca_reference(*qkv, **options, **fetched, bounds=bounds, rope=one), None
    return longctx.cca_attention(*qkv, **options, rope=turn), None


AttentionInterface.register("longctx_cca_reference", _attend)


class _NoRotation(torch.nn.Module):
    """The model's rotary module, for keys that are rotated within attention."""

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self._size = 2 * len(rotary.inv_freq)

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ones = x.new_ones(*position_ids.shape, self._size)
        return ones, torch.zeros_like(ones)


class CCAModel:
    """Logits of whole sequences, computed at once."""

    def __init__(self, folder: Path, *, dtype: torch.dtype = torch.float32, core_fetch: int = 0) -> None:
        self._core_fetch = core_fetch
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="longctx_cca_reference"
        )
        decoder = self._model.model
        self._rotary = decoder.rotary_emb
        decoder.rotary_emb = _NoRotation(self._rotary)

    @torch.inference_mode()
    def logits(self, token_ids: list[int], spec: CCASpec) -> torch.Tensor:
        """``[len(token_ids), vocabulary]``."""
        for layer in self._model.model.layers:
            attention = layer.self_attn
            attention.cca_spec, attention.cca_rope, attention.core_fetch = spec, self._turn, self._core_fetch
        return self._model(torch.tensor([token_ids]), use_cache=False).logits[0].float()

    def check(
        self, prompt: list[int], new_ids: list[int], logprobs: list[TokenLogprob], spec: CCASpec, *, tolerance: float
    ) -> None:
        """The engine's greedy tokens are this model's, and so are its log probabilities."""
        wanted = self.logits(prompt + new_ids[:-1], spec)[len(prompt) - 1 :].log_softmax(-1)
        assert len(new_ids) == len(logprobs)
        for row, token_id, got in zip(wanted, new_ids, logprobs, strict=True):
            assert row[token_id] >= row.max() - tolerance
            ids = [token_id for token_id, _ in got.top]
            torch.testing.assert_close(
                torch.tensor([value for _, value in got.top]), row[ids], atol=tolerance, rtol=tolerance
            )

    def _turn(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        angles = positions[..., None].float() * self._rotary.inv_freq
        cos, sin = (torch.cat((f(angles),) * 2, -1) * self._rotary.attention_scaling for f in (torch.cos, torch.sin))
        low, high = x.float().chunk(2, -1)
        return (x * cos + torch.cat((-high, low), -1) * sin).to(x.dtype)
