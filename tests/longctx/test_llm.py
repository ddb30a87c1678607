"""``LLM`` as a user calls it, and the thread that serves an engine."""

import threading
from concurrent.futures import Future

import pytest
import torch

from longctx import LLM, SamplingParams
from longctx.engine.config import EngineConfig
from longctx.engine.loop import EngineLoop
from longctx.errors import CheckpointError, ConfigError, RequestError, WorkerLostError
from longctx.models.config import ModelConfig
from parallel.carrier import ExchangeError
from tests.longctx.engines import GREEDY, make_engine, make_request
from tests.longctx.greedy import generate_reference
from tests.tiny_checkpoints import make_checkpoint

PROMPTS = ["def main():", "one two three", "x"]
SMALL = EngineConfig(kv_bytes="4MiB", num_threads=1, max_sequences=8)
TIMEOUT_S = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(folder, engine_config=SMALL) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference(folder, llm):
    return generate_reference(folder, [llm.encode_prompt(prompt) for prompt in PROMPTS], num_new=24)


def test_generate_texts_and_ids(llm, reference):
    outputs = llm.generate(PROMPTS, GREEDY)
    assert [list(output.outputs[0].token_ids) for output in outputs] == reference
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert list(output.prompt_token_ids) == llm.encode_prompt(prompt)
        (sequence,) = output.outputs
        assert sequence.text == llm.tokenizer.decode(sequence.token_ids)
        assert (sequence.index, sequence.finish_reason, sequence.stop_reason) == (0, "length", None)
    again = llm.generate([llm.encode_prompt(prompt) for prompt in PROMPTS], [GREEDY] * 3)
    assert [output.outputs for output in again] == [output.outputs for output in outputs]
    assert llm.generate(PROMPTS[0], GREEDY)[0].outputs == outputs[0].outputs
    assert llm.generate(llm.encode_prompt(PROMPTS[0]), GREEDY)[0].outputs == outputs[0].outputs
    assert llm.generate([], GREEDY) == []


def test_n_logprobs_and_stop(llm, reference):
    params = SamplingParams(n=3, seed=5, max_tokens=6, logprobs=2, ignore_eos=True)
    outputs = llm.generate(PROMPTS[0], params)[0].outputs
    assert [output.index for output in outputs] == [0, 1, 2]
    for output in outputs:
        assert [logprob.token_id for logprob in output.logprobs] == list(output.token_ids)
        assert all(len(logprob.top) == 2 and logprob.logprob <= 0 for logprob in output.logprobs)
    stop_id = reference[0][3]
    stopped = llm.generate(PROMPTS[0], SamplingParams(temperature=0, stop_token_ids=(stop_id,)))[0].outputs[0]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop_id)


def test_more_prompts_than_the_queue_takes(folder):
    with LLM(folder, engine_config=EngineConfig(kv_bytes="4MiB", num_threads=1, max_waiting=2, max_sequences=2)) as llm:
        prompts = [[i, i + 1, i + 2] for i in range(12)]
        outputs = llm.generate(prompts, GREEDY)
        assert [list(output.prompt_token_ids) for output in outputs] == prompts
        assert all(len(output.outputs[0].token_ids) == 24 for output in outputs)


def test_stream_equals_generate_and_reports_progress(llm, reference):
    progress = []
    deltas = list(llm.stream(PROMPTS[0], GREEDY, on_progress=lambda *seen: progress.append(seen)))
    assert [token_id for delta in deltas for token_id in delta.token_ids] == reference[0]
    assert "".join(delta.text for delta in deltas) == llm.generate(PROMPTS[0], GREEDY)[0].outputs[0].text
    assert deltas[-1].finish_reason == "length"
    total = len(llm.encode_prompt(PROMPTS[0]))
    assert progress[0] == (0, total) and progress[-1] == (total, total)


def test_streams_interleave_and_closing_one_cancels_it(llm, reference):
    first, second = llm.stream(PROMPTS[0], GREEDY), llm.stream(PROMPTS[1], GREEDY)
    token_ids = [next(first).token_ids[0], next(first).token_ids[0]]
    rest = [delta.token_ids[0] for delta in second]
    assert (token_ids, rest) == (reference[0][:2], reference[1])
    first.close()
    assert not llm.engine.has_work and llm.engine.stats().num_pages_used == 0


def test_threads_share_one_llm(llm, reference):
    results = [None] * 3

    def generate(index):
        results[index] = list(llm.generate(PROMPTS[index], GREEDY)[0].outputs[0].token_ids)

    threads = [threading.Thread(target=generate, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert results == reference


def test_chat(llm):
    messages = [{"role": "user", "content": "hello"}]
    output = llm.chat(messages, GREEDY)
    assert list(output.prompt_token_ids) == llm.encode_chat(messages)
    assert output.outputs == llm.generate(llm.encode_chat(messages), GREEDY)[0].outputs


def test_bad_input_names_what_is_wrong(llm):
    with pytest.raises(RequestError, match="the prompt is empty"):
        llm.generate(["fine", []], GREEDY)
    assert not llm.engine.has_work
    with pytest.raises(ValueError, match="2 sampling params for 1 prompts"):
        llm.generate("x", [GREEDY, GREEDY])


def test_a_failing_step_is_raised_and_the_next_call_works(llm, monkeypatch, reference):
    monkeypatch.setattr(llm.engine.decoder, "forward", lambda batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        llm.generate(PROMPTS, GREEDY)
    monkeypatch.undo()
    assert list(llm.generate(PROMPTS[2], GREEDY)[0].outputs[0].token_ids) == reference[2]


def test_a_closed_llm_says_so(folder):
    llm = LLM(folder, engine_config=SMALL)
    llm.close()
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate("x")


BAD_CONFIGS = {
    "model.max_context=2048": ({"max_context": 2048}, {}),
    "model.attention='flash_attn'": ({"attention": "flash_attn"}, {}),
    "model.attention='nonsense'": ({"attention": "nonsense"}, {}),
    "model.device='cuda'": ({"device": "cuda"}, {}),
    "engine.page_size=7": ({"attention": "native"}, {"page_size": 7}),
    "engine.kv_bytes='1KiB'": ({}, {"kv_bytes": "1KiB"}),
}


@pytest.mark.parametrize("key", BAD_CONFIGS)
def test_bad_configurations_name_the_key(folder, key):
    if key == "model.device='cuda'" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    model, engine = BAD_CONFIGS[key]
    with pytest.raises(ConfigError) as caught:
        LLM(folder, model_config=ModelConfig(**model), engine_config=EngineConfig(num_threads=1, **engine))
    assert str(caught.value).startswith(f"{key} is not allowed")


def test_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        LLM(tmp_path / "nothing")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_generate(tmp_path, dtype):
    folder = make_checkpoint(tmp_path / dtype, "qwen3", dtype=dtype)
    with LLM(folder, engine_config=SMALL) as llm:
        assert llm.engine.stats().dtype == {"bfloat16": "bfloat16", "float16": "float32"}[dtype]
        assert len(llm.generate("hello", GREEDY)[0].outputs[0].token_ids) == 24


# The engine's thread


class Recorder:
    """Collects deltas by request and says when one has ended."""

    def __init__(self):
        self.deltas, self.ended = {}, {}

    def expect(self, request_id):
        self.deltas[request_id] = []
        self.ended[request_id] = Future()

    def __call__(self, deltas):
        for delta in deltas:
            self.deltas[delta.request_id].append(delta)
            if delta.finish_reason:
                self.ended[delta.request_id].set_result(delta)

    def token_ids(self, request_id):
        return [token_id for delta in self.deltas[request_id] for token_id in delta.token_ids]


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def loop(folder, recorder):
    loop = EngineLoop(make_engine(folder), recorder)
    yield loop
    loop.close(TIMEOUT_S)


def submit(loop, recorder, request):
    recorder.expect(request.request_id)
    loop.call(loop.engine.add, request).result(TIMEOUT_S)


def test_loop_serves_requests_and_sleeps_in_between(loop, recorder, llm, reference):
    for index, prompt in enumerate(PROMPTS):
        submit(loop, recorder, make_request(str(index), llm.encode_prompt(prompt)))
    for index in range(3):
        assert recorder.ended[str(index)].result(TIMEOUT_S).finish_reason == "length"
        assert recorder.token_ids(str(index)) == reference[index]
    submit(loop, recorder, make_request("later", llm.encode_prompt(PROMPTS[0])))
    recorder.ended["later"].result(TIMEOUT_S)
    assert recorder.token_ids("later") == reference[0]


def test_loop_hands_exceptions_to_the_caller(loop):
    with pytest.raises(RequestError, match="the prompt is empty"):
        loop.call(loop.engine.add, make_request("x", [])).result(TIMEOUT_S)
    assert loop.call(loop.engine.stats).result(TIMEOUT_S).num_running == 0


def test_loop_survives_a_failing_step_and_a_failing_consumer(loop, recorder, monkeypatch, reference, llm):
    monkeypatch.setattr(loop.engine.decoder, "forward", lambda batch: 1 / 0)
    submit(loop, recorder, make_request("a", [1, 2, 3]))
    delta = recorder.ended["a"].result(TIMEOUT_S)
    assert delta.finish_reason == "error"
    assert delta.error == "the engine failed with ZeroDivisionError; its log says more"
    monkeypatch.undo()
    loop.call(loop.engine.add, make_request("unexpected", [1, 2, 3])).result(TIMEOUT_S)  # the recorder raises KeyError
    submit(loop, recorder, make_request("b", llm.encode_prompt(PROMPTS[0])))
    recorder.ended["b"].result(TIMEOUT_S)


def test_closing_the_loop_ends_what_is_in_flight(folder, recorder):
    loop = EngineLoop(make_engine(folder), recorder)
    submit(
        loop, recorder, make_request("a", [1, 2, 3], SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True))
    )
    loop.close(TIMEOUT_S)
    assert recorder.ended["a"].result(TIMEOUT_S).finish_reason in ("abort", "length")
    with pytest.raises(RuntimeError, match="closed"):
        loop.call(loop.engine.stats)
    assert loop.engine.stats().num_pages_used == 0


def test_a_lost_rank_is_told_to_all_who_wait(folder, recorder, monkeypatch):
    engine, reasons = make_engine(folder), []
    in_step, may_fail = threading.Event(), threading.Event()

    def step():
        in_step.set()
        may_fail.wait(TIMEOUT_S)
        raise ExchangeError("rank 1 is gone")

    monkeypatch.setattr(engine, "step", step)
    loop = EngineLoop(engine, recorder, on_broken=reasons.append)
    submit(loop, recorder, make_request("a", [1, 2, 3]))
    assert in_step.wait(TIMEOUT_S)
    call = loop.call(engine.stats)
    may_fail.set()
    delta = recorder.ended["a"].result(TIMEOUT_S)
    assert (delta.finish_reason, delta.error) == ("error", "the engine failed: rank 1 is gone")
    with pytest.raises(WorkerLostError, match="the engine failed: rank 1 is gone"):
        call.result(TIMEOUT_S)
    with pytest.raises(WorkerLostError, match="the engine failed: rank 1 is gone"):
        loop.call(engine.stats)
    assert reasons == ["rank 1 is gone"]
    loop.close(TIMEOUT_S)


def test_a_loop_that_fails_between_steps_says_why(folder, recorder, monkeypatch, caplog):
    engine, reason = make_engine(folder), Future()
    monkeypatch.setattr(engine, "keep_alive", lambda: 1 / 0)
    loop = EngineLoop(engine, recorder, on_broken=reason.set_result)
    assert reason.result(TIMEOUT_S) == "division by zero"
    loop.close(TIMEOUT_S)
    assert "ZeroDivisionError" in caplog.text
    with pytest.raises(WorkerLostError, match="division by zero"):
        loop.call(engine.stats)
