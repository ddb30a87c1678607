"""How long a plan takes under a link model: the executor's schedule, played through without computing anything.

A rank posts a step's messages when it has done the step before and holds what it passes on; a message starts when both
ends have posted it and the way is free; work starts when its rank is free and its rows are there. At a switch a message
takes its turn at the sender's port and then at the receiver's, so that a busy receiver does not hold up the sender's
next one. A message, however small, keeps its sender from the next one for a moment and takes its receiver as long to
notice; a tile, however small, keeps its rank from the next. Bytes take processor time of both ends: they come no faster
than their hosts handle them one after the other, and computing meanwhile gets what they leave of its rank's time.
"""

from collections import defaultdict
from dataclasses import dataclass, field

from parallel.links import LinkModel
from parallel.plan import Heads, Move, Plan, Return, Work, by_step

FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5  # matrix products per unmasked entry, 2 * head_dim operations each


@dataclass(frozen=True, slots=True)
class Event:
    """Something that takes time: computing on a rank, or a message between two."""

    kind: str  # "compute", "q", "kv", or their "return"
    rank: int  # who computes or sends
    peer: int  # who receives; the rank itself if it computes
    owner: int  # whose rows
    step: int
    start_s: float
    stop_s: float
    num_bytes: int = 0


@dataclass(slots=True)
class Prediction:
    """A plan's schedule."""

    plan: Plan
    seconds: float = 0.0
    compute_s: float = 0.0  # of the rank that computes longest
    num_bytes: int = 0  # over all links
    events: list[Event] = field(default_factory=list)

    @property
    def exposed_s(self) -> float:
        """Time in which the busiest rank does not compute."""
        return self.seconds - self.compute_s


def predict(plan: Plan, links: LinkModel, *, backward: bool = False) -> Prediction:
    """The schedule of one direction of a plan."""
    return _Player(plan, links, backward).play()


class _Player:
    def __init__(self, plan: Plan, links: LinkModel, backward: bool) -> None:
        self.plan, self.links, self.backward = plan, links, backward
        self.prediction = Prediction(plan)
        self.free_at = [0.0] * plan.problem.world_size  # when a rank has computed all it was given so far
        self.link_free_at: dict[tuple[int, int], float] = defaultdict(float)
        self.sender_free_at = [0.0] * plan.problem.world_size  # to post the next message
        self.arrived_at: dict[tuple[int, str, int, Heads], float] = {}
        self.home_at: dict[tuple[int, int], float] = defaultdict(float)  # owner and step of a return
        self.hosts = [Host() for _ in self.free_at]
        self.moves, self.works = by_step(plan.moves_in(backward=backward)), by_step(plan.works)
        self.returns = by_step(plan.returns(backward=backward))

    def play(self) -> Prediction:
        busy = [0.0] * len(self.free_at)
        for step in range(self.plan.num_steps + 1):
            self._wait_for_what_moves_on(step)
            reached_at = list(self.free_at)
            for move in sorted(self.moves[step], key=lambda move: self._distance(move.source, move.destination)):
                ready = max(reached_at[move.source], reached_at[move.destination])
                stop = self._send(move, move.source, move.destination, ready)
                self.arrived_at[move.destination, move.kind, move.owner, move.heads] = stop
            for back in sorted(self.returns[step - 1], key=lambda back: self._distance(back.source, back.owner)):
                ready = max(reached_at[back.source], reached_at[back.owner])
                stop = self._send(back, back.source, back.owner, ready)
                self.home_at[back.owner, back.step] = max(self.home_at[back.owner, back.step], stop)
            for work in self.works[step]:
                busy[work.rank] += self._compute(work)
            folded = self.plan.folded_after(step, backward=self.backward) - 1  # those before it were waited for before
            self.free_at = [max(free, self.home_at[rank, folded]) for rank, free in enumerate(self.free_at)]
        prediction = self.prediction
        prediction.seconds = max((*self.free_at, *self.home_at.values()), default=0.0)
        prediction.compute_s = max(busy, default=0.0)
        return prediction

    def _distance(self, source: int, destination: int) -> int:
        """What is posted together shares a port: as if all sent to their next first, which keeps every port busy."""
        return (destination - source) % self.plan.problem.world_size

    def _wait_for_what_moves_on(self, step: int) -> None:
        for move in self.moves[step]:
            arrived = self.arrived_at.get((move.source, move.kind, move.owner, move.heads), 0.0)
            self.free_at[move.source] = max(self.free_at[move.source], arrived)

    def _send(self, item: Move | Return, source: int, destination: int, ready: float) -> float:
        plan, links = self.plan, self.links
        node_size = plan.problem.world_size // plan.problem.num_nodes or 1
        between_nodes = source // node_size != destination // node_size
        if isinstance(item, Move):
            kind, num_bytes = item.kind, plan.move_bytes(item, backward=self.backward)
        else:
            kind, num_bytes = f"{item.kind} return", plan.return_bytes(item, backward=self.backward)
        seconds = links.seconds(num_bytes, between_nodes=between_nodes)
        out = (source, destination) if links.topology == "mesh" else (source, -1)
        posted = max(ready, self.sender_free_at[source])
        self.sender_free_at[source] = posted + links.message_s
        start = max(posted, self.link_free_at[out])
        end = self.link_free_at[out] = start + seconds
        if links.topology == "switch":
            end = self.link_free_at[-1, destination] = max(end, self.link_free_at[-1, destination] + seconds)
        if handling := num_bytes * links.host_byte_s:
            hosts = self.hosts[source], self.hosts[destination]
            end = max(end, *(host.take(start, handling) for host in hosts))
            for host in hosts:
                host.handlings.append((start, end, handling))
        stop = end + links.latency(between_nodes=between_nodes) + links.message_s
        self.prediction.events.append(Event(kind, source, destination, item.owner, item.step, start, stop, num_bytes))
        self.prediction.num_bytes += num_bytes
        return stop

    def _compute(self, work: Work) -> float:
        problem = self.plan.problem
        arrivals = [
            self.arrived_at.get((work.rank, kind, owner, work.heads), 0.0)
            for kind, owner in (("q", work.q_owner), ("kv", work.kv_owner))
            if owner != work.rank
        ]
        start = max(self.free_at[work.rank], *arrivals, 0.0)
        entries = sum(tile.area for tile in work.tiles) * (work.heads[1] - work.heads[0]) * problem.batch_size
        products = BACKWARD_PRODUCTS if self.backward else FORWARD_PRODUCTS
        seconds = entries * products * 2 * problem.head_dim / self.links.flops_per_s
        seconds += len(work.tiles) * self.links.tile_s * products / FORWARD_PRODUCTS
        stop = self.free_at[work.rank] = self.hosts[work.rank].compute(start, seconds)
        self.prediction.events.append(Event("compute", work.rank, work.rank, work.q_owner, work.step, start, stop))
        return seconds


class Host:
    """A rank's processor, which handles bytes and computes; bytes come first."""

    def __init__(self) -> None:
        self.handlings: list[tuple[float, float, float]] = []  # of a message: start, stop, seconds of work between
        self._free_at = 0.0  # when it has handled all bytes

    def take(self, start: float, seconds: float) -> float:
        """When it can have handled a message that starts then."""
        self._free_at = max(start, self._free_at) + seconds
        return self._free_at

    def compute(self, start: float, seconds: float) -> float:
        """When it has computed for so long beside the messages that are known."""
        self.handlings = [each for each in self.handlings if each[1] > start]
        for stop in sorted({edge for each in self.handlings for edge in each[:2] if edge > start}):
            share = sum(work / (end - begin) for begin, end, work in self.handlings if begin <= start < end)
            done = (stop - start) * max(0.0, 1.0 - share)
            if done >= seconds:
                return start + seconds / (1.0 - share)
            start, seconds = stop, seconds - done
        return start + seconds
