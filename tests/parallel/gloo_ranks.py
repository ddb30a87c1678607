"""Runs a function on real gloo ranks, each a process of its own, and brings back what each returned."""

import multiprocessing
import queue
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.fork_server import FORKS, start_process

START_TIMEOUT_S = 60.0


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    num_lost: int = 0,
    timeout_s: float = 240.0,
    uses_gpu: bool = False,
) -> list[Any]:
    """What ``function(rank, world_size, folder, *arguments)`` returned on each rank; None from ``num_lost`` of them.

    Ranks are forked, which is fast; those that use a GPU start anew, since CUDA does not survive a fork.
    Raises ``AssertionError`` with the traceback of a rank that raised, or if ranks do not come back.
    """
    context = multiprocessing.get_context("spawn") if uses_gpu else FORKS
    answers: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            start_process(_run, function, rank, world_size, folder, answers, arguments, context=context)
            for rank in range(world_size)
        ]
        results = _collect(answers, world_size - num_lost, timeout_s)
        for rank, process in enumerate(ranks):
            process.join(5 if rank in results else 0)
            process.kill()
    return [results.get(rank) for rank in range(world_size)]


def join_group(folder: str, name: str, rank: int, world_size: int) -> None:
    """Make the default group; ``name`` tells groups in one folder apart."""
    store = f"file://{Path(folder) / name}"
    timeout = timedelta(seconds=START_TIMEOUT_S)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=timeout)


def _collect(answers: Any, num_answers: int, timeout_s: float) -> dict[int, Any]:
    results: dict[int, Any] = {}
    while len(results) < num_answers:
        try:
            rank, is_good, result = answers.get(timeout=timeout_s)
        except queue.Empty:
            raise AssertionError(f"only ranks {sorted(results)} came back") from None
        assert is_good, f"rank {rank}:\n{result}"
        results[rank] = result
    return results


def _run(function: Any, rank: int, world_size: int, folder: str, answers: Any, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    join_group(folder, "first", rank, world_size)
    try:
        answers.put((rank, True, function(rank, world_size, folder, *arguments)))
    except BaseException:
        answers.put((rank, False, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
