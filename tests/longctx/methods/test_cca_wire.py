"""What travels under CCA attention: cores and window, which are all that the receiver needs."""

from dataclasses import replace

import pytest
import torch

from longctx.messages import SamplingParams
from longctx.models.attention_spec import CCASpec
from tests.longctx.engines import CopyingExport, check_pages, hand_over, make_request, run
from tests.longctx.methods.test_cca_engine import PARAMS, SPEC, cca_engine, generate, make_prompt, with_sizes
from tests.tiny_checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize("attention", ["native", "torch"])
@pytest.mark.parametrize("params", [PARAMS, with_sizes(16, 40), with_sizes(1, 3), replace(PARAMS, n=2, seed=3)])
def test_the_receiver_goes_on_bit_for_bit(folder, params, attention):
    """With the same company, since another batch rounds otherwise: none."""
    prefill, decode, alone = (cca_engine(folder, attention=attention) for _ in range(3))
    for length in (1, 4, 16, 61, 203):
        request = make_request("r", make_prompt(length), params)
        export = hand_over(prefill, decode, request)
        run(prefill)
        pages = range(len(export.reservation.pages))
        assert sorted(export.announced) == [(layer, page) for layer in range(2) for page in pages]
        prefill.export_done("r")
        deltas = [*decode.attach("r", export.first), *run(decode)]
        for engine in (prefill, decode):
            check_pages(engine)
            assert engine.stats().num_pages_used == 0
        alone.add(request)
        wanted = run(alone)
        for index in range(params.n):
            got, theirs = ([delta for delta in each if delta.index == index] for each in (deltas, wanted))
            assert [delta.token_ids for delta in got] == [delta.token_ids for delta in theirs]
            logprobs = [export.first.logprobs[index], *(delta.logprobs[0] for delta in got[1:])]
            assert logprobs == [delta.logprobs[0] for delta in theirs]


def test_pages_in_use_travel_and_nothing_else(tmp_path):
    """Within 1 % of L / g + s entries."""
    folder = make_checkpoint(tmp_path, "llama", max_position_embeddings=32768, num_hidden_layers=1)
    spec, length = CCASpec(8, 64), 32000
    prefill, decode = (cca_engine(folder, spec, kv_bytes="2MiB", max_batch_tokens=2048) for _ in range(2))
    export = hand_over(prefill, decode, make_request("r", make_prompt(length), SamplingParams(max_tokens=2)))
    run(prefill)
    layout = prefill.pool.layout
    num_bytes, entry_bytes = len(export.announced) * layout.block_bytes, layout.block_bytes // layout.page_size
    formula = (length / 8 + 64) * entry_bytes
    assert formula <= num_bytes <= 1.01 * formula


def test_cancelled_and_refused_arrivals_give_their_pages_back(folder):
    prefill, decode = (cca_engine(folder) for _ in range(2))
    exports = [hand_over(prefill, decode, make_request(str(i), make_prompt(100 + i), PARAMS)) for i in range(2)]
    prefill.step()
    prefill.cancel("0")
    decode.release_reservation("0")
    assert exports[0].failure == "the request was cancelled"
    run(prefill)
    prefill.export_done("1")
    assert decode.stats().num_pages_used > 0
    decode.cancel("1")
    for engine in (prefill, decode):
        check_pages(engine)
        assert engine.stats().num_pages_used == 0
    ids, _ = generate(decode, [make_request("1", make_prompt(101), PARAMS)])
    wanted, _ = generate(prefill, [make_request("1", make_prompt(101), PARAMS)])
    assert ids == wanted


def test_no_more_is_reserved_than_there_is(folder):
    engine = cca_engine(folder, num_pages=15)
    assert engine.reserve(make_request("a", make_prompt(500), with_sizes(16, 32))) is not None
    assert engine.reserve(make_request("b", make_prompt(300), with_sizes(2, 32))) is None
    engine.release_reservation("a")
    assert engine.stats().num_pages_used == 0


def test_received_pages_are_those_computed(folder):
    prefill, decode = (cca_engine(folder, max_batch_tokens=16) for _ in range(2))
    request = make_request("a", make_prompt(171), PARAMS)
    reservation = decode.reserve(request)
    export = CopyingExport(prefill.pool, decode.pool, reservation)
    prefill.add(request, export=export)
    run(prefill)
    sequence = prefill._requests["a"].sequences[0]
    pages = sequence.cores.lasting(sequence.pages, 171, 16)
    assert torch.equal(prefill.pool.storage[:, pages], decode.pool.storage[:, list(reservation.pages)])
    assert len(pages) == -(-(171 // SPEC.group_size) // 16) + -(-171 // 16) - SPEC_FIRST // 16


SPEC_FIRST = (171 + 1 - SPEC.window) // SPEC.group_size * SPEC.group_size
