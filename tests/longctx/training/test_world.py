"""Rank arithmetic of dp x sp, and numbers that ranks agree on."""

import torch

from longctx.training.config import ParallelConfig
from longctx.training.place import find_port
from longctx.training.world import TrainingWorld, locate, sp_ranks
from tests.parallel.gloo_ranks import run_ranks


def test_ranks_of_a_sequence_are_neighbours():
    places = [(at.dp_rank, at.sp_rank) for at in (locate(rank, 2) for rank in range(4))]
    assert places == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [sp_ranks(dp_rank, 2) for dp_rank in range(2)] == [[0, 1], [2, 3]]


def agree(rank: int, world_size: int, _: str, port: int):
    torch.distributed.destroy_process_group()
    world = TrainingWorld(
        rank, ParallelConfig(dp_degree=2, sp_degree=2), address="127.0.0.1", port=port, device=torch.device("cpu")
    )
    shared = torch.tensor([float(rank)])
    torch.distributed.all_reduce(shared, group=world.sp_group)
    answer = world.add_up([1.0, rank]), world.largest([-rank]), shared.item()
    world.close()
    return answer


def test_ranks_agree():
    answers = run_ranks(agree, 4, find_port("127.0.0.1"))
    assert [answer[:2] for answer in answers] == [([4.0, 6.0], [0.0])] * 4
    assert [answer[2] for answer in answers] == [1.0, 1.0, 5.0, 5.0]
