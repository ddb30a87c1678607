"""Where a rank of a training world is, what it is told, and what it answers: all that crosses its process.

Ranks are numbered node by node, so that those of a sequence group, which talk most, are neighbours. No torch here.
"""

import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from longctx.errors import LongctxError
from longctx.training.config import TrainConfig

BODY = "longctx.training.trainer:train_rank"  # what a rank runs: (TrainConfig, RankPlace) -> its report


@dataclass(frozen=True, slots=True)
class RankPlace:
    """One rank of the world."""

    global_rank: int
    world_size: int
    local_rank: int  # among the ranks of its node
    local_world_size: int
    master_address: str  # rank 0's, where the world meets
    master_port: int
    node: str  # its node's name
    restart: int  # how often the gang was started again


@dataclass(frozen=True, slots=True)
class RankOrder:
    """What a rank is to do."""

    config: TrainConfig
    place: RankPlace
    body: str = BODY  # "module:function"


@dataclass(frozen=True, slots=True)
class RankOutcome:
    """How a rank ended; one of the three is set."""

    report: dict[str, Any] | None = None  # what its body returned
    error: LongctxError | None = None  # would happen again: the user's to mend
    failure: str = ""  # traceback of anything else; a lost peer makes one, too


def order_ranks(nodes: Sequence[str]) -> list[int]:
    """Indices into ``nodes`` with those of one node side by side, the fullest nodes first.

    A group of ranks then spans nodes only where no node has room for it: after nodes of 1, 2 and 1, pairs in the order
    of appearance would all be torn.
    """
    counts = Counter(nodes)
    return sorted(range(len(nodes)), key=lambda index: (-counts[nodes[index]], nodes.index(nodes[index]), index))


def make_places(nodes: Sequence[str], *, address: str, port: int, restart: int) -> list[RankPlace]:
    """The places of ranks on ``nodes``, in rank order; those of one node lie side by side."""
    counts = Counter(nodes)
    return [
        RankPlace(
            global_rank=rank,
            world_size=len(nodes),
            local_rank=rank - nodes.index(node),
            local_world_size=counts[node],
            master_address=address,
            master_port=port,
            node=node,
            restart=restart,
        )
        for rank, node in enumerate(nodes)
    ]


def find_port(address: str) -> int:
    """A port that is free at this machine's ``address``."""
    with socket.create_server((address, 0)) as probe:
        return probe.getsockname()[1]
