"""Runs an exchange plan: one rank's part, forward and backward, as a generator that yields where it has to wait.

    at the start of step s:  post together  moves of s, returns of s - 1
                             compute        works of s, waiting for what arrived in earlier steps
                             fold in        returns of s - 2, as long as there are moves to come
    at the end:              returns that are left are folded in, sends are waited for

A real group drives one generator and blocks where it yields; virtual ranks are several generators that one process
advances in turn. Results are added up in the plan's order, so they do not depend on who was faster.
"""

from collections import defaultdict
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch

from parallel.carrier import Carrier, ExchangeError, Message, Transfer
from parallel.merge import merge_partial_
from parallel.plan import Heads, Move, Plan, Return, Rows, Work, by_step, count_rows
from parallel.tile_attention import accumulator_dtype

Key = tuple[str, int, Heads]  # kind, owner, query heads
Waiting = Generator["Wait", None, None]


@dataclass(frozen=True, slots=True)
class Wait:
    """A rank cannot go on before ``transfer`` is done."""

    transfer: Transfer
    step: int


@dataclass(slots=True)
class Held:
    """Some rows of one owner; dim 1 of each tensor runs over them."""

    rows: Rows
    tensors: tuple[torch.Tensor, ...]

    def cut(self, start: int, stop: int) -> tuple[torch.Tensor, ...]:
        """Rows ``[start, stop)`` of the owner, which must lie in one range."""
        offset = 0
        for first, end in self.rows:
            if first <= start and stop <= end:
                place = slice(offset + start - first, offset + stop - first)
                return tuple(tensor[:, place] for tensor in self.tensors)
            offset += end - first
        raise AssertionError(f"rows {start}:{stop} are not held: {self.rows}")


class Exchange:
    """One rank's run of a plan; subclasses say what travels and what is computed."""

    backward = False

    def __init__(self, plan: Plan, rank: int, carrier: Carrier, own: dict[str, tuple[torch.Tensor, ...]]) -> None:
        self.plan, self.rank = plan, rank
        self._carrier = carrier
        self._own = {kind: Held(((0, tensors[0].shape[1]),), tensors) for kind, tensors in own.items()}
        self._held: dict[Key, Held] = {}
        self._arriving: dict[Key, tuple[Wait, Held]] = {}
        self._sums: dict[Key, Held] = {}
        self._coming_home: list[tuple[Return, Wait, Held]] = []
        self._sent: list[Wait] = []
        returns = plan.returns_of(rank, backward=self.backward)
        self._works, self._moves = by_step(plan.works_of(rank)), by_step(plan.moves_of(rank, backward=self.backward))
        self._returns = by_step(returns)
        self._foreign_rows = {(b.kind, b.owner, b.heads): b.rows for b in returns if b.source == rank}
        self._last_use = self._find_last_uses()

    def run(self) -> Waiting:
        """Everything; the subclass has the results afterwards."""
        for step in range(self.plan.num_steps + 1):
            yield from self._post(step)
            for work in self._works[step]:
                q = yield from self._get("q", work.q_owner, work.heads)
                kv = yield from self._get("kv", work.kv_owner, work.heads)
                self.compute(work, q, kv)
            yield from self._fold(before=self.plan.folded_after(step, backward=self.backward))
            self._drop(step)
        yield from self._fold(before=self.plan.num_steps)
        yield from self._sent

    def compute(self, work: Work, q: Held, kv: Held) -> None:
        """Attend ``work`` and add to the sums."""
        raise NotImplementedError

    def add(self, back: Return, held: Held) -> None:
        """Add what came home."""
        raise NotImplementedError

    def travelling(self, kind: str, held: Held) -> Held:
        """What of the held tensors moves."""
        return held

    def arrived(self, key: Key, held: Held) -> Held:
        """What is held once a move has brought its part."""
        return held

    def dropped(self, key: Key) -> None:
        """What is no more held: nothing behind this step needs it."""

    def sums_for(self, work: Work, kind: str) -> Held:
        """Where results on ``work``'s queries or keys are added up here."""
        owner = work.q_owner if kind == "q" else work.kv_owner
        if owner == self.rank:
            return self._cut_heads(self.own_sums(kind), kind, work.heads)
        key = (kind, owner, work.heads)
        if key not in self._sums:
            rows = self._foreign_rows[key]
            self._sums[key] = Held(rows, self.new_sums(kind, count_rows(rows), work.heads))
        return self._sums[key]

    def own_sums(self, kind: str) -> Held:
        """The rank's own results, all heads."""
        raise NotImplementedError

    def new_sums(self, kind: str, num_rows: int, heads: Heads) -> tuple[torch.Tensor, ...]:
        """Empty sums on another rank's rows; the widest elements come first."""
        raise NotImplementedError

    def _post(self, step: int) -> Waiting:
        receives, arrivals = [], []
        for move in self._moves[step]:
            if move.destination == self.rank:
                held = Held(move.rows, self._empty(move))
                receives.append(self._receive(move, move.source, held.tensors))
                arrivals.append((move, held))
        homecoming = []
        for back in self._returns[step - 1]:
            if back.owner == self.rank:
                held = Held(back.rows, self.new_sums(back.kind, count_rows(back.rows), back.heads))
                receives.append(self._receive(back, back.source, held.tensors))
                homecoming.append((back, held))
        sends = []
        for move in self._moves[step]:
            if move.source == self.rank:
                held = yield from self._get(move.kind, move.owner, move.heads)
                packed = _pack(self.travelling(move.kind, held), move.rows)
                sends.append(Message(packed, move.destination, self.plan.tags[move]))
        for back in self._returns[step - 1]:
            if back.source == self.rank:
                held = self._sums.pop((back.kind, back.owner, back.heads))
                sends.append(Message(_pack(held, back.rows), back.owner, self.plan.tags[back]))
        try:
            sent, received = self._carrier.post(sends, receives)
        except RuntimeError as error:  # a peer is known to be gone
            raise ExchangeError(f"rank {self.rank}, step {step}: {error}") from error
        self._sent = [wait for wait in self._sent if not wait.transfer.is_done()]
        self._sent += [Wait(transfer, step) for transfer in sent]
        waits = [Wait(transfer, step) for transfer in received]
        for (move, held), wait in zip(arrivals, waits, strict=False):
            self._arriving[move.kind, move.owner, move.heads] = wait, held
        for (back, held), wait in zip(homecoming, waits[len(arrivals) :], strict=True):
            self._coming_home.append((back, wait, held))

    def _receive(self, item: Move | Return, source: int, tensors: Sequence[torch.Tensor]) -> Message:
        return Message(_bytes_behind(tensors), source, self.plan.tags[item])

    def _get(self, kind: str, owner: int, heads: Heads) -> Generator[Wait, None, Held]:
        if owner == self.rank:
            return self._cut_heads(self._own[kind], kind, heads)
        key = (kind, owner, heads)
        if key in self._arriving:
            wait, held = self._arriving.pop(key)
            yield wait
            self._held[key] = self.arrived(key, held)
        return self._held[key]

    def _cut_heads(self, held: Held, kind: str, heads: Heads) -> Held:
        first, stop = heads if kind == "q" else self.plan.problem.kv_heads(heads)
        return Held(held.rows, tuple(tensor[:, :, first:stop] for tensor in held.tensors))

    def _empty(self, move: Move) -> tuple[torch.Tensor, ...]:
        """Room for what a move brings: one buffer, cut like the own tensors, the widest elements first."""
        own = self._cut_heads(self._own[move.kind], move.kind, move.heads)
        return allocate_rows(self.travelling(move.kind, own).tensors, count_rows(move.rows))

    def _fold(self, *, before: int) -> Waiting:
        while self._coming_home and self._coming_home[0][0].step < before:
            back, wait, held = self._coming_home.pop(0)
            yield wait
            self.add(back, held)

    def _find_last_uses(self) -> dict[Key, int]:
        uses: dict[Key, int] = defaultdict(int)
        for step, works in self._works.items():
            for work in works:
                for kind, owner in (("q", work.q_owner), ("kv", work.kv_owner)):
                    uses[kind, owner, work.heads] = max(step, uses[kind, owner, work.heads])
        for step, moves in self._moves.items():
            for move in moves:
                if move.source == self.rank:
                    key = (move.kind, move.owner, move.heads)
                    uses[key] = max(step, uses[key])
        return uses

    def _drop(self, step: int) -> None:
        for key in [key for key in self._held if self._last_use[key] <= step]:
            del self._held[key]
            self.dropped(key)


class ForwardExchange(Exchange):
    """Attention; afterwards ``out`` ``[B, S, H, D]`` and ``lse`` ``[B, S, H]`` are this rank's, not yet rounded.

    With ``keeps``, ``kept`` is what arrived; else it is dropped as soon as it is used up.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        carrier: Carrier,
        own: dict[str, tuple[torch.Tensor, ...]],
        *,
        keeps: bool = False,
    ) -> None:
        self.kept: dict[Key, Held] = {}
        self._keeps = keeps
        (self._template,) = own["q"]
        self._dtype = accumulator_dtype(self._template.dtype)
        super().__init__(plan, rank, carrier, own)
        self.out, self.lse = self.new_sums("q", self._template.shape[1], plan.problem.all_heads)

    def arrived(self, key: Key, held: Held) -> Held:
        if self._keeps:
            self.kept[key] = held
        return held

    def add(self, back: Return, held: Held) -> None:
        own = self._cut_heads(self.own_sums("q"), "q", back.heads)
        for start, stop in back.rows:
            merge_partial_(*own.cut(start, stop), *held.cut(start, stop))

    def own_sums(self, kind: str) -> Held:
        return Held(((0, self.out.shape[1]),), (self.out, self.lse))

    def new_sums(self, kind: str, num_rows: int, heads: Heads) -> tuple[torch.Tensor, ...]:
        batch_size, _, _, head_dim = self._template.shape
        num_heads = heads[1] - heads[0]
        out, lse = allocate_rows(
            (
                self._template.new_empty((batch_size, 0, num_heads, head_dim), dtype=self._dtype),
                self._template.new_empty((batch_size, 0, num_heads), dtype=self._dtype),
            ),
            num_rows,
        )
        return out.zero_(), lse.fill_(float("-inf"))


def allocate_rows(templates: Sequence[torch.Tensor], num_rows: int) -> tuple[torch.Tensor, ...]:
    """Tensors like the templates but with ``num_rows`` rows, one behind the other in one buffer."""
    shapes = [(template.shape[0], num_rows, *template.shape[2:]) for template in templates]
    sizes = [torch.Size(shape).numel() * t.element_size() for shape, t in zip(shapes, templates, strict=True)]
    buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=templates[0].device)
    parts = buffer.split(sizes)
    return tuple(
        part.view(template.dtype).view(shape) for part, template, shape in zip(parts, templates, shapes, strict=True)
    )


def _bytes_behind(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The one buffer that ``allocate_rows`` cut, as bytes."""
    storage = tensors[0].untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensors[0].device).set_(storage)


def _pack(held: Held, rows: Rows) -> torch.Tensor:
    """Some of the held rows in one buffer, as ``allocate_rows`` lays them out; the buffer itself if that is all."""
    if held.rows == rows and _is_packed(held.tensors):
        return _bytes_behind(held.tensors)
    packed = allocate_rows(held.tensors, count_rows(rows))
    offset = 0
    for start, stop in rows:
        for target, source in zip(packed, held.cut(start, stop), strict=True):
            target[:, offset : offset + stop - start].copy_(source)
        offset += stop - start
    return _bytes_behind(packed)


def _is_packed(tensors: Sequence[torch.Tensor]) -> bool:
    storage, offset = tensors[0].untyped_storage(), 0
    for tensor in tensors:
        if (
            not tensor.is_contiguous()
            or tensor.untyped_storage().data_ptr() != storage.data_ptr()
            or tensor.storage_offset() * tensor.element_size() != offset
        ):
            return False
        offset += tensor.numel() * tensor.element_size()
    return offset == storage.nbytes()
