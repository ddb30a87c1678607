"""A model behind an OpenAI-compatible endpoint: ours, vLLM's, any other."""

import asyncio
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import httpx

from longctx.errors import ConfigError, LongctxError
from longctx.evaluation.target import Answer, OnAnswer, OnProgress, Question, Target

if TYPE_CHECKING:
    from longctx.models.tokenizer import Tokenizer  # and transformers with it: seconds, before an endpoint is refused

CONNECT_TIMEOUT_S = 10.0
TRIES = 4  # of one request at an endpoint that is busy or starts a worker again
RETRY_S = 2.0  # before the first of them, doubled each time, unless the endpoint says how long
BUSY = (429, 502, 503)


class EndpointTarget(Target):
    """Requests to ``/completions`` or ``/chat/completions``.

    Args:
        url: up to and with ``/v1``.
        model: what ``find_model`` found.
        api_key: sent as a bearer token.
        tokenizer: counts tokens; None: ``chars_per_token`` estimates them.
        chars_per_token: characters of one token.
        chat: ``"true"``, ``"false"``, or ``"auto"``: if the tokenizer has a chat template, or there is no tokenizer.
        concurrency: requests at one time.
        timeout_s: longest wait for one answer.
    """

    def __init__(
        self,
        url: str,
        *,
        model: dict[str, Any],
        api_key: str | None,
        tokenizer: "Tokenizer | None",
        chars_per_token: float,
        chat: str,
        concurrency: int,
        timeout_s: float,
    ) -> None:
        self._url, self._tokenizer, self._chars_per_token = url.rstrip("/"), tokenizer, chars_per_token
        self._headers = make_headers(api_key)
        self._concurrency, self._timeout = concurrency, httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S)
        self.name = str(model["id"])
        limit = model.get("max_model_len")
        self.max_context = limit if isinstance(limit, int) else None
        has_template = tokenizer is None or tokenizer.chat_template is not None
        self.is_chat = chat == "true" or (chat == "auto" and has_template)
        counted = (
            f"an estimate: {chars_per_token:g} characters a token" if tokenizer is None else "model.path's tokenizer"
        )
        self.description = {
            "name": self.name,
            "endpoint": self._url,
            "chat": self.is_chat,
            "tokens_counted_by": f"{counted}; num_tokens of a prompt is the endpoint's count where it tells",
        }

    def count(self, text: str) -> int:
        if self._tokenizer is None:
            return math.ceil(len(text) / self._chars_per_token)
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    def measure(self, prompt: str, lead: str) -> int:
        text = prompt if self.is_chat else prompt + lead
        if self._tokenizer is None:
            return math.ceil(len(text) / self._chars_per_token)
        if self.is_chat and self._tokenizer.chat_template is not None:
            return len(self._tokenizer.encode_chat([{"role": "user", "content": text}]))
        return len(self._tokenizer.encode(text))

    def ask(self, questions: Sequence[Question], on_answer: OnAnswer, on_progress: OnProgress) -> None:
        asyncio.run(self._ask_all(questions, on_answer))

    def score(self, text: str, num_tokens: int, on_progress: OnProgress) -> tuple[list[float], int]:
        raise LongctxError("an endpoint gives no log probabilities of a given text")

    def close(self) -> None:
        """Connections end with each call of ``ask``."""

    async def _ask_all(self, questions: Sequence[Question], on_answer: OnAnswer) -> None:
        slots = asyncio.Semaphore(self._concurrency)

        async def ask_one(index: int, question: Question) -> None:
            async with slots:
                answer = await self._ask(client, question)
            on_answer(index, answer)

        # trust_env: a proxy of the environment is not asked for this machine's own servers.
        async with httpx.AsyncClient(timeout=self._timeout, headers=self._headers, trust_env=False) as client:
            try:
                async with asyncio.TaskGroup() as group:
                    for index, question in enumerate(questions):
                        group.create_task(ask_one(index, question))
            except BaseExceptionGroup as group:
                raise _first(group) from None

    async def _ask(self, client: httpx.AsyncClient, question: Question) -> Answer:
        body: dict[str, Any] = {"model": self.name, "max_tokens": question.max_tokens, "temperature": 0}
        if self.is_chat:
            body["messages"] = [{"role": "user", "content": question.prompt}]
        else:
            body["prompt"] = question.prompt + question.lead
        url = f"{self._url}/{'chat/completions' if self.is_chat else 'completions'}"
        response = await self._post(client, url, body)
        try:
            content = response.json()
            choice = content["choices"][0]
            text = choice["message"]["content"] if self.is_chat else choice["text"]
            num_tokens = (content.get("usage") or {}).get("prompt_tokens")
        except (ValueError, KeyError, IndexError, TypeError):
            raise LongctxError(f"{url} answered something else than a completion: {response.text[:200]!r}") from None
        if num_tokens is None:
            num_tokens = self.measure(question.prompt, question.lead)
        return Answer(text or "", num_tokens, str(choice.get("finish_reason")))

    async def _post(self, client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> httpx.Response:
        wait_s = RETRY_S
        for attempt in range(1, TRIES + 1):
            try:
                response = await client.post(url, json=body)
            except httpx.HTTPError as error:
                raise LongctxError(f"{url} does not answer: {_say(error)}") from None
            if response.is_success:
                return response
            if response.status_code not in BUSY or attempt == TRIES:
                raise LongctxError(f"{url} answered {response.status_code}: {_read_error(response)}")
            await asyncio.sleep(_retry_after(response, wait_s))
            wait_s *= 2
        raise AssertionError("the last try returns or raises")


def make_headers(api_key: str | None) -> dict[str, str]:
    """What every request carries."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def find_model(url: str, model: str | None, api_key: str | None) -> dict[str, Any]:
    """The endpoint's own words about one of its models; None: the first that it names.

    Raises:
        ConfigError: if the endpoint cannot be reached, refuses the key or has no such model.
    """
    url = url.rstrip("/")
    try:
        response = httpx.get(f"{url}/models", headers=make_headers(api_key), timeout=CONNECT_TIMEOUT_S, trust_env=False)
        response.raise_for_status()
        entries = {str(entry["id"]): entry for entry in response.json()["data"]}
    except httpx.HTTPStatusError as error:
        hint = "; eval.api_key=KEY" if error.response.status_code in (401, 403) else ""
        raise ConfigError(
            f"eval.endpoint={url} answered {error.response.status_code} to /models: {_read_error(error.response)}{hint}"
        ) from None
    except httpx.HTTPError as error:
        raise ConfigError(f"eval.endpoint={url} does not answer: {_say(error)}") from None
    except (httpx.InvalidURL, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"eval.endpoint={url} is no OpenAI-compatible endpoint; as http://127.0.0.1:8000/v1"
        ) from None
    if not entries:
        raise ConfigError(f"eval.endpoint={url} serves no model")
    name = next(iter(entries)) if model is None else model
    if name not in entries:
        raise ConfigError(f"eval.model={name} is not served by {url}; allowed: {', '.join(entries)}")
    return entries[name]


def _first(group: BaseExceptionGroup) -> BaseException:
    """The first failure of several requests; the others, most often alike, were cancelled or are left out."""
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


def _say(error: httpx.HTTPError) -> str:
    return f"{type(error).__name__}{f': {error}' if str(error) else ''}"


def _read_error(response: httpx.Response) -> str:
    """The error's text in OpenAI's shape, or the beginning of whatever came."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200]


def _retry_after(response: httpx.Response, default_s: float) -> float:
    try:
        return float(response.headers.get("Retry-After", default_s))
    except ValueError:
        return default_s
