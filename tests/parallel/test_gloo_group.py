"""Groups without global state: several in one process, told, heard, gathered, lost and made anew."""

import threading

import pytest
import torch

from parallel.carrier import ExchangeError
from parallel.gloo_group import GlooGroup, open_meeting

LOOPBACK = "127.0.0.1"


def make_group(world_size, *, timeout_s=10.0):
    """Every rank of a group, each made on a thread of its own."""
    meeting = open_meeting(LOOPBACK, timeout_s=timeout_s)
    ranks: list[GlooGroup | None] = [None] * world_size

    def join(rank):
        place = meeting if rank == 0 else (LOOPBACK, meeting.port)
        ranks[rank] = GlooGroup(rank, world_size, meeting=place, address=LOOPBACK, timeout_s=timeout_s)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(ranks)
    return ranks


def on_all(ranks, function):
    """What ``function(rank)`` returned on each rank, all at once."""
    results = [None] * len(ranks)

    def run(index):
        results[index] = function(ranks[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_rank_0_tells_and_the_others_hear_it_in_order():
    ranks = make_group(3)

    def talk(group):
        if group.rank == 0:
            for text in (b"one", b"", b"a longer second one", b"x" * 100_000):
                group.tell(text)
            return None
        return [group.listen(5.0) for _ in range(4)]

    _, *heard = on_all(ranks, talk)
    assert heard == [[b"one", b"", b"a longer second one", b"x" * 100_000]] * 2


def test_rows_are_gathered_in_rank_order_also_none():
    ranks = make_group(3)
    counts = [1, 0, 2]

    def gather(group):
        own = torch.full((counts[group.rank], 4), float(group.rank), dtype=torch.bfloat16)
        return group.gather_rows(own, counts)

    whole, *rest = on_all(ranks, gather)
    assert torch.cat(whole)[:, 0].tolist() == [0.0, 2.0, 2.0]
    assert rest == [[], []]
    assert on_all(ranks, lambda group: group.gather_numbers([group.rank, 7], 5.0)) == [[[0, 7], [1, 7], [2, 7]]] * 3


def test_two_groups_live_in_one_process_and_a_lost_rank_is_named():
    first, second = make_group(2), make_group(2)
    first[1].close()
    with pytest.raises(ExchangeError, match="rank 0 could not send to rank 1"):
        first[0].tell(b"x" * 16_000_000)  # more than the system takes for a peer that is gone
    heard = on_all(second, lambda group: group.tell(b"still here") if group.rank == 0 else group.listen(5.0))
    assert heard[1] == b"still here"


def test_numbers_that_do_not_come_name_their_rank():
    ranks = make_group(3)

    def gather(group):
        if group.rank == 2:
            return ""
        with pytest.raises(ExchangeError) as caught:
            group.gather_numbers([group.rank], 1.0)
        return str(caught.value)

    texts = on_all(ranks, gather)
    for rank in (0, 1):
        assert f"rank {rank} could not receive from rank 2 within 1 s" in texts[rank]


def test_silence_is_an_error_in_time():
    ranks = make_group(2)
    with pytest.raises(ExchangeError, match=r"rank 1 could not receive from rank 0 within 0\.3 s"):
        ranks[1].listen(0.3)


def test_a_rank_that_never_comes_is_an_error():
    meeting = open_meeting(LOOPBACK, timeout_s=1.0)
    with pytest.raises(ExchangeError, match=r"rank 0 of 2 at 127\.0\.0\.1 did not find the others"):
        GlooGroup(0, 2, meeting=meeting, address=LOOPBACK, timeout_s=1.0)
