"""The trace of a call on real ranks: what is in it, and in which order things began."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import longctx
from parallel.carrier import ExchangeError
from tests.parallel.gloo_ranks import run_ranks

WORLD_SIZE = 2


def attend(rank: int, world_size: int, _: str, folder: str) -> float:
    torch.manual_seed(rank)
    q, k, v = (torch.randn(1, 64, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    plain = longctx.token_ring_attention(q, k, v, group=None)
    traced = longctx.token_ring_attention(q, k, v, group=None, trace=folder)
    traced.sum().backward()
    return (plain - traced).abs().max().item()


def read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text().rstrip().rstrip(",") + "]")


def test_a_trace_shows_tiles_and_messages(tmp_path):
    folder = tmp_path / "made"
    assert run_ranks(attend, WORLD_SIZE, str(folder)) == [0.0, 0.0]
    for rank in range(WORLD_SIZE):
        first, *events = read(folder / f"rank-{rank}.json")
        assert first["args"]["name"] == f"rank {rank}"
        assert {event["pid"] for event in events} == {rank}
        assert all(event["ph"] == "X" and event["dur"] >= 0 for event in events)
        for direction in ("token_ring forward", "token_ring backward"):
            own = [event for event in events if event["cat"] == direction]
            lanes = {event["tid"] for event in own}
            assert lanes == {"compute", f"send to {1 - rank}", f"receive from {1 - rank}"}
            sent = {event["name"]: event for event in own if event["tid"].startswith("send")}
            assert set(sent) == {f"q of {rank}", f"partial output or dQ of {1 - rank}"}
            # A step's messages are under way before its tiles begin; the last partial output too.
            for message in sent.values():
                step = message["args"]["step"]
                tiles = [e for e in own if e["tid"] == "compute" and e["args"]["step"] == step]
                assert tiles
                assert all(message["ts"] <= tile["ts"] for tile in tiles)


def test_tensors_of_a_device_are_refused(tmp_path):
    q = torch.empty(1, 64, 2, 16, device="meta")
    with pytest.raises(ValueError, match="trace with tensors on meta is not allowed"):
        longctx.token_ring_attention(q, q, q, group=None, trace=tmp_path)


def attend_alone(rank: int, world_size: int, _: str, folder: str) -> str:
    """Rank 1 agrees to the call, and then is not there."""
    from parallel import attention

    q = torch.randn(1, 64, 2, 16)
    if rank == 1:
        attention.Forward.run = lambda self: iter(())
    try:
        longctx.token_ring_attention(q, q, q, group=None, trace=folder, timeout_s=2.0)
    except ExchangeError as error:
        return str(error)
    return ""


def test_a_stalled_peer_is_named_all_the_same(tmp_path):
    (error, _) = run_ranks(attend_alone, WORLD_SIZE, str(tmp_path))
    assert "rank 0, step 0: could not receive from rank 1" in error
