"""The official client, unmodified, gets what the engine generates when asked directly."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI

from longctx.engine.config import EngineConfig
from longctx.llm import LLM, RequestOutput
from longctx.messages import SamplingParams
from longctx.models.config import ModelConfig
from tests.local_server import MODEL_NAME, LocalServer, serve
from tests.tiny_checkpoints import make_checkpoint

PROMPTS = ["The sky is", "def add(a, b):", "Once upon a time"]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the pass key?"}]
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), "llama", seed=3)  # its outputs are long


@pytest.fixture(scope="module")
def server(folder) -> Iterator[LocalServer]:
    with serve(folder) as running:
        yield running


@pytest.fixture(scope="module")
def llm(folder) -> Iterator[LLM]:
    """The reference: an engine of its own."""
    config = ModelConfig(path=str(folder), attention="torch")
    with LLM(model_config=config, engine_config=EngineConfig(kv_bytes="4MiB", page_size=16, num_threads=1)) as made:
        yield made


@pytest.fixture(scope="module")
def client(server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30) as made:
        yield made


def expect(llm: LLM, prompt, **params) -> RequestOutput:
    """What the engine itself makes of one prompt."""
    options: dict[str, Any] = {"max_tokens": NUM_TOKENS} | params
    return llm.generate([prompt], SamplingParams(**options))[0]


def token_text(llm: LLM, token_id: int) -> str:
    return llm.tokenizer.decode([token_id], skip_special_tokens=False)


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == MODEL_NAME
    assert client.models.retrieve(MODEL_NAME) == model
    with pytest.raises(NotFoundError, match="not served"):
        client.models.retrieve("other/model")


@pytest.mark.parametrize("prompt", [PROMPTS[0], list(PROMPTS[1].encode())], ids=["text", "token_ids"])
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 7, "top_p": 0.9}])
def test_completion(client, llm, prompt, params):
    reference = expect(llm, prompt, **params)
    answer = client.completions.create(model=MODEL_NAME, prompt=prompt, max_tokens=NUM_TOKENS, **params)
    (output,) = reference.outputs
    assert answer.choices[0].text == output.text
    assert answer.choices[0].finish_reason == output.finish_reason
    assert answer.usage.prompt_tokens == len(reference.prompt_token_ids)
    assert answer.usage.completion_tokens == len(output.token_ids)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_many_prompts_and_choices(client, llm):
    answer = client.completions.create(
        model=MODEL_NAME, prompt=PROMPTS, n=2, seed=3, max_tokens=NUM_TOKENS, temperature=1.2
    )
    expected = [
        output.text for prompt in PROMPTS for output in expect(llm, prompt, n=2, seed=3, temperature=1.2).outputs
    ]
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == expected
    assert len(set(expected)) == 6
    assert answer.usage.prompt_tokens == sum(map(len, PROMPTS))


def test_streams_interleave_with_the_right_index(client):
    fields = {"model": MODEL_NAME, "prompt": PROMPTS, "n": 2, "seed": 5, "max_tokens": NUM_TOKENS, "echo": True}
    whole = client.completions.create(**fields)
    texts, reasons, usage = [""] * 6, [None] * 6, None
    for chunk in client.completions.create(**fields, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert texts[0].startswith(PROMPTS[0])
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_chat(client, llm):
    (output,) = expect(llm, llm.encode_chat(MESSAGES), temperature=0.0).outputs
    answer = client.chat.completions.create(
        model=MODEL_NAME, messages=MESSAGES, max_completion_tokens=NUM_TOKENS, temperature=0.0
    )
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == output.text


def test_content_parts_are_joined(client):
    fields = {"model": MODEL_NAME, "max_tokens": NUM_TOKENS, "temperature": 0.0}
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    answer = client.chat.completions.create(messages=[{"role": "user", "content": parts}], **fields)
    same = client.chat.completions.create(messages=[{"role": "user", "content": "one\ntwo"}], **fields)
    assert answer.choices[0].message.content == same.choices[0].message.content


def test_chat_stream_has_the_official_shape(client):
    fields = {"model": MODEL_NAME, "messages": MESSAGES, "max_tokens": NUM_TOKENS, "temperature": 0.0, "n": 2}
    whole = client.chat.completions.create(**fields)
    chunks = list(client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for index, choice in enumerate(whole.choices):
        own = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == index]
        assert own[0].delta.role == "assistant"
        assert all(part.delta.role is None for part in own[1:])
        assert "".join(part.delta.content or "" for part in own) == choice.message.content
        assert [part.finish_reason for part in own] == [None] * (len(own) - 1) + [choice.finish_reason]


def test_stop_string_is_cut(client, llm):
    (output,) = expect(llm, PROMPTS[0], temperature=0.0).outputs
    start = next(i for i in range(5, len(output.text)) if output.text[i : i + 2].isascii())
    stop = output.text[start : start + 2]
    answer = client.completions.create(
        model=MODEL_NAME, prompt=PROMPTS[0], max_tokens=NUM_TOKENS, temperature=0.0, stop=[stop]
    )
    assert answer.choices[0].text == output.text[: output.text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_completion_logprobs(client, llm, stream):
    (output,) = expect(llm, PROMPTS[0], temperature=0.0, logprobs=3).outputs
    answer = client.completions.create(
        model=MODEL_NAME, prompt=PROMPTS[0], max_tokens=NUM_TOKENS, temperature=0.0, logprobs=3, stream=stream
    )
    given = [
        choice.logprobs for chunk in (answer if stream else [answer]) for choice in chunk.choices if choice.logprobs
    ]
    logprobs = [value for part in given for value in part.token_logprobs]
    offsets = [value for part in given for value in part.text_offset]
    tokens = [value for part in given for value in part.tokens]
    assert logprobs == pytest.approx([entry.logprob for entry in output.logprobs], abs=1e-5)
    assert tokens == [token_text(llm, token_id) for token_id in output.token_ids]
    assert offsets == [sum(map(len, tokens[:i])) for i in range(len(tokens))]
    first = {token_text(llm, token_id): logprob for token_id, logprob in reversed(output.logprobs[0].top)}
    assert given[0].top_logprobs[0] == pytest.approx(first, abs=1e-5)


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(client, llm, stream):
    (output,) = expect(llm, llm.encode_chat(MESSAGES), temperature=0.0, logprobs=2).outputs
    answer = client.chat.completions.create(
        model=MODEL_NAME,
        messages=MESSAGES,
        max_tokens=NUM_TOKENS,
        temperature=0.0,
        logprobs=True,
        top_logprobs=2,
        stream=stream,
    )
    parts = [
        choice.logprobs for chunk in (answer if stream else [answer]) for choice in chunk.choices if choice.logprobs
    ]
    entries = [entry for part in parts for entry in part.content]
    assert [entry.logprob for entry in entries] == pytest.approx([entry.logprob for entry in output.logprobs], abs=1e-5)
    for entry, expected in zip(entries, output.logprobs, strict=True):
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(
            [value for _, value in expected.top], abs=1e-5
        )
        assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token


def test_extensions_reach_the_engine(client, llm):
    params = {"min_p": 0.05, "top_k": 20, "repetition_penalty": 1.3, "min_tokens": 4, "ignore_eos": True}
    biased = ord("z")
    (output,) = expect(
        llm, PROMPTS[2], seed=11, logit_bias=((biased, 3.0),), stop_token_ids=(10,), presence_penalty=0.5, **params
    ).outputs
    answer = client.completions.create(
        model=MODEL_NAME,
        prompt=PROMPTS[2],
        seed=11,
        max_tokens=NUM_TOKENS,
        logit_bias={str(biased): 3.0},
        presence_penalty=0.5,
        extra_body=params | {"stop_token_ids": [10], "cache_salt": "mine"},
    )
    assert answer.choices[0].text == output.text


def test_cached_tokens_are_counted_within_one_salt(client):
    document = "x" * 200 + "What follows is cached."

    def ask(salt: str) -> int:
        answer = client.completions.create(
            model=MODEL_NAME, prompt=document, max_tokens=1, extra_body={"cache_salt": salt}
        )
        return answer.usage.prompt_tokens_details.cached_tokens

    assert [ask("a"), ask("b")] == [0, 0]
    assert 0 < ask("a") < len(document)


def test_async_client_streams_together(server, llm):
    async def ask(client: AsyncOpenAI, seed: int) -> str:
        stream = await client.completions.create(
            model=MODEL_NAME, prompt=PROMPTS[seed % 3], seed=seed, max_tokens=NUM_TOKENS, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def ask_all() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
            assert (await client.models.retrieve(MODEL_NAME)).id == MODEL_NAME
            return await asyncio.gather(*(ask(client, seed) for seed in range(16)))

    texts = asyncio.run(ask_all())
    assert texts == [expect(llm, PROMPTS[seed % 3], seed=seed).outputs[0].text for seed in range(16)]


def test_prompt_at_the_context_limit(client, server):
    limit = server.engine.max_context
    answer = client.completions.create(model=MODEL_NAME, prompt=[65] * (limit - 1), max_tokens=5)
    assert answer.usage.completion_tokens == 1
    with pytest.raises(BadRequestError) as caught:
        client.completions.create(model=MODEL_NAME, prompt=[65] * limit, max_tokens=5)
    assert caught.value.code == "context_length_exceeded"
    assert str(limit) in caught.value.message
