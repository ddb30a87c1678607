"""What NCCL needs, as far as a CPU shows it: messages in order, its carrier over gloo, and who is named when late."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from parallel import attention, nccl_carrier
from parallel.carrier import Carrier, ExchangeError, Message, Transfer, drive
from parallel.exchange import Wait
from parallel.nccl_carrier import GroupCall, NcclCarrier
from parallel.plans import PLANS
from tests.parallel.cells import CELLS
from tests.parallel.gloo_ranks import run_ranks
from tests.parallel.test_exchange import LAYOUT
from tests.parallel.test_sequence_parallel_attention import check_cells
from tests.parallel.virtual_ranks import run_virtual_ranks


class Recorder(Carrier):
    """Notes what each post exchanges with whom."""

    def __init__(self, carrier: Carrier, posts: list[list[list[tuple[str, int, int, int]]]]) -> None:
        self._carrier, self.rank, self.world_size = carrier, carrier.rank, carrier.world_size
        self.own: list[list[tuple[str, int, int, int]]] = []
        posts.append(self.own)

    def post(self, sends, receives):
        directions = (("send", sends), ("receive", receives))
        self.own.append([(name, m.peer, m.tag, m.buffer.numel()) for name, group in directions for m in group])
        return self._carrier.post(sends, receives)

    def gather_numbers(self, numbers, timeout_s):
        return self._carrier.gather_numbers(numbers, timeout_s)


@pytest.mark.parametrize("plan", list(PLANS))
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_both_ends_post_the_same_messages_in_the_same_order(plan, world_size):
    """NCCL matches by order: in every group call, what one rank sends another is what that one receives."""
    for cell in CELLS[world_size - 2 :: 3]:
        posts: list[list[list[tuple[str, int, int, int]]]] = []
        run_virtual_ranks(
            cell.make_inputs(),
            cell.mask,
            plan,
            world_size=world_size,
            layout=LAYOUT.get(cell.mask_name, "zigzag"),
            num_nodes=2 if world_size == 4 else 1,
            watch=lambda carrier, posts=posts: Recorder(carrier, posts),
        )
        assert len(posts) == 2 * world_size
        num_messages = 0
        for ranks in (posts[:world_size], posts[world_size:]):  # forward, backward
            assert len({len(own) for own in ranks}) == 1, cell
            for calls in zip(*ranks, strict=True):
                for source in range(world_size):
                    for destination in range(world_size):
                        sent = [m[2:] for m in calls[source] if m[:2] == ("send", destination)]
                        received = [m[2:] for m in calls[destination] if m[:2] == ("receive", source)]
                        assert sent == received, (str(cell), source, destination)
                        assert not sent or source != destination
                        num_messages += len(sent)
        assert num_messages or cell.lengths_name == "short" or cell.mask_name in ("packed", "packed_window"), cell


class Stream:
    """A stream of a device that does everything at once, and notes what it was told."""

    log: list[str]

    def __init__(self, name: str) -> None:
        self.name = name

    def record_event(self):
        self.log.append(f"{self.name} records")
        return Event(has_happened=True)

    def wait_event(self, event):
        self.log.append(f"{self.name} waits")


def attend_over_gloo(rank, world_size, folder, cells, plans):
    """The NCCL carrier over gloo, which like NCCL matches messages of one tag by their order."""
    Stream.log = []
    compute, messages = Stream("compute"), Stream("messages")
    cuda = SimpleNamespace(
        Stream=lambda device: messages, current_stream=lambda device: compute, stream=lambda _: nullcontext()
    )
    nccl_carrier.torch = SimpleNamespace(
        **{name: getattr(torch, name) for name in ("tensor", "int64", "device", "Tensor")}, cuda=cuda
    )

    class CpuCarrier(NcclCarrier):
        device_type = "cpu"

        def __init__(self, group):
            self._group, self._device, self._stream = group, torch.device("cpu"), messages
            self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)

    attention.open_carrier = lambda group, device: CpuCarrier(dist.group.WORLD)
    check_cells(rank, world_size, folder, cells, plans)
    posted = [i for i, line in enumerate(Stream.log) if line == "messages waits"]
    assert posted and "compute waits" in Stream.log
    for i in posted:  # what was computed before comes first, and its end is noted
        assert Stream.log[i - 1] == "compute records" and Stream.log[i + 1] == "messages records"
    return True


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_nccl_carrier_needs_no_tags(world_size):
    cells = CELLS[:: 14 if world_size == 4 else 21]
    assert run_ranks(attend_over_gloo, world_size, cells, list(PLANS)) == [True] * world_size


class Event:
    """Happens when it is told to."""

    def __init__(self, *, has_happened: bool) -> None:
        self.has_happened = has_happened

    def query(self):
        return self.has_happened

    def synchronize(self):
        assert self.has_happened, "the process would wait for ever"


class LateTransfer(Transfer):
    """Asynchronous, over a group call."""

    is_asynchronous = True
    verb = "receive from"

    def __init__(self, call: GroupCall, message: Message, waited: list[int]) -> None:
        self._call, self.peer, self._waited = call, message.peer, waited

    def is_done(self):
        return self._call.done.query()

    def wait(self, timeout_s):
        self._waited.append(self.peer)

    def confirm(self, timeout_s):
        self._call.confirm(timeout_s)


def exchange_with(calls, waited):
    """Waits in another order than that of the steps, as sends are waited for last."""
    buffer = torch.empty(0, dtype=torch.uint8)
    for step, (peer, call) in reversed(list(enumerate(calls))):
        yield Wait(LateTransfer(call, Message(buffer, peer, step), waited), step)


def make_calls(*have_happened, error=None):
    aborted: list[str] = []

    def check():
        if error:
            raise RuntimeError(error)

    calls = []
    for peer, done in enumerate(have_happened, 1):
        ready = Event(has_happened=all(have_happened[: peer - 1]))
        calls.append((peer, GroupCall(ready, Event(has_happened=done), [peer, 7], check, lambda: aborted.append("a"))))
    return calls, aborted


def test_the_process_waits_at_the_end_only():
    calls, aborted = make_calls(True, True, True)
    waited: list[int] = []
    drive(exchange_with(calls, waited), 0, 0.05)
    assert waited == [3, 2, 1] and not aborted


def test_the_first_late_message_is_named_and_the_group_aborted():
    calls, aborted = make_calls(True, False, False)
    waited: list[int] = []
    with pytest.raises(
        ExchangeError, match=r"rank 0, step 1: could not receive from rank 2 .* the NCCL call with 2, 7"
    ):
        drive(exchange_with(calls, waited), 0, 0.05)
    assert waited == [3, 2, 1], "the device waits in the meantime, the process did not"
    assert aborted == ["a"]


def test_a_failed_group_is_not_taken_for_a_finished_call():
    calls, _ = make_calls(True, True, error="the NCCL group has failed: TIMEOUT")
    with pytest.raises(ExchangeError, match=r"rank 0, step 0: could not receive from rank 1 .* has failed: TIMEOUT"):
        drive(exchange_with(calls, []), 0, 0.05)
