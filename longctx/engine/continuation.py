"""What becomes of sampled tokens: sequences go on, end, or split into the n that were asked for."""

from collections.abc import Sequence as Items

from longctx.engine.announcer import LayerAnnouncer
from longctx.engine.sampling import SamplerState
from longctx.engine.scheduler import Scheduler
from longctx.engine.sequence import ActiveRequest, Sequence
from longctx.messages import OutputDelta, TokenLogprob


class Continuation:
    """Gives tokens to their sequences.

    Args:
        scheduler: where sequences go on, or give their pages up.
        announcer: takes the first tokens of exported prompts.
        requests: by id; those that end are removed.
    """

    def __init__(self, scheduler: Scheduler, announcer: LayerAnnouncer, requests: dict[str, ActiveRequest]) -> None:
        self._scheduler = scheduler
        self._announcer = announcer
        self._requests = requests

    def extend(
        self, decoding: list[Sequence], token_ids: list[int], logprobs: list[TokenLogprob | None]
    ) -> list[OutputDelta]:
        """The step's tokens of all decode rows, in their order."""
        self._scheduler.rows.advance(token_ids)
        deltas = []
        for sequence, token_id, logprob in zip(decoding, token_ids, logprobs, strict=True):
            sequence.num_computed += 1
            delta = sequence.accept(token_id, logprob)
            deltas.append(delta)
            if delta.finish_reason is not None:
                self._end(sequence)
        return deltas

    def begin(
        self,
        sequence: Sequence,
        states: list[SamplerState],
        token_ids: Items[int],
        logprobs: Items[TokenLogprob | None],
    ) -> list[OutputDelta]:
        """The tokens of a sequence whose last position was just computed: a prompt's, or a preempted sequence's.

        Args:
            sequence: in no queue, with its pages.
            states: what sampled the tokens (``Sequence.first_samplers``).
            token_ids, logprobs: one for each state.
        """
        active = sequence.active
        if active.export is not None:
            self._announcer.finish(active, token_ids, logprobs)
            active.is_forked = True
            return []
        sequences = [sequence]
        if not active.is_forked:
            sequences += [Sequence(active, idx, state) for idx, state in enumerate(states[1:], start=1)]
            active.sequences = list(sequences)
            active.is_forked = True
        deltas = [s.accept(token, logprob) for s, token, logprob in zip(sequences, token_ids, logprobs, strict=True)]
        # The first sequence comes last: the others take its pages over.
        for target, delta in zip(reversed(sequences), reversed(deltas), strict=True):
            if delta.finish_reason is not None:
                self._end(target)
            elif target is sequence or self._scheduler.fork_pages(sequence, target):
                self._scheduler.rows.add(target)
            else:
                self._scheduler.enqueue(target)
        return deltas

    def _end(self, sequence: Sequence) -> None:
        self._scheduler.drop(sequence)
        active = sequence.active
        active.sequences.remove(sequence)
        if not active.sequences:
            del self._requests[active.request_id]
