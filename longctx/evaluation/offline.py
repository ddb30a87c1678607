"""A model in this process: prompts of one call run together through the engine, as far as its pages reach."""

from collections.abc import Sequence
from dataclasses import replace

from longctx.errors import LongctxError
from longctx.evaluation.target import Answer, OnAnswer, OnProgress, Question, Target
from longctx.llm import LLM
from longctx.messages import SamplingParams
from longctx.models.checkpoint import ModelSpec


class OfflineTarget(Target):
    """An ``LLM``.

    Args:
        llm: closed with the target.
        spec: its checkpoint.
        chat: ``"true"``, ``"false"``, or ``"auto"``: if it has a chat template.
        adapter: what was put into it, for the results.
    """

    def __init__(self, llm: LLM, spec: ModelSpec, *, chat: str, adapter: str | None) -> None:
        self._llm, self._tokenizer = llm, llm.tokenizer
        self.name, self.max_context = spec.name, llm.engine.max_context
        self.is_chat = chat == "true" or (chat == "auto" and self._tokenizer.chat_template is not None)
        stats = llm.engine.stats()
        self.description = {
            "name": spec.name,
            "path": str(spec.path),
            "adapter": adapter,
            "num_parameters": spec.num_parameters,
            "dtype": stats.dtype,
            "device": stats.device,
            "attention": stats.attention,
            "chat": self.is_chat,
            "tokens_counted_by": "the model's tokenizer",
        }

    def count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    def measure(self, prompt: str, lead: str) -> int:
        return len(self._encode(prompt, lead))

    def ask(self, questions: Sequence[Question], on_answer: OnAnswer, on_progress: OnProgress) -> None:
        prompts = [self._encode(question.prompt, question.lead) for question in questions]
        greedy = SamplingParams(temperature=0.0)
        params = [replace(greedy, max_tokens=question.max_tokens) for question in questions]
        for index, output in enumerate(self._llm.generate_in_turn(prompts, params, on_progress=on_progress)):
            sequence = output.outputs[0]
            on_answer(index, Answer(sequence.text, len(output.prompt_token_ids), sequence.finish_reason or ""))

    def score(self, text: str, num_tokens: int, on_progress: OnProgress) -> tuple[list[float], int]:
        begin = self._tokenizer.begin_token_ids
        ids = [*begin, *self._tokenizer.encode(text, add_special_tokens=False)]
        if len(ids) < num_tokens:
            raise LongctxError(f"a text of {len(text)} characters has only {len(ids)} of {num_tokens} tokens")
        ids = ids[:num_tokens]
        num_bytes = len(self._tokenizer.decode(ids[max(len(begin), 1) :]).encode())
        return self._llm.score(ids, on_progress=on_progress), num_bytes

    def close(self) -> None:
        self._llm.close()

    def _encode(self, prompt: str, lead: str) -> list[int]:
        if self.is_chat:
            return self._llm.encode_chat([{"role": "user", "content": prompt}])
        return self._llm.encode_prompt(prompt + lead)
