"""Incremental text: the pieces add up to the whole, and stop strings end it where they begin."""

import random

import pytest

from longctx.engine.output import OutputText
from longctx.messages import SamplingParams
from longctx.models.checkpoint import inspect_checkpoint
from longctx.models.tokenizer import load_tokenizer

EOS = frozenset({256})
TEXTS = ("plain text", "naïve Ω 漢字 🙂👩‍👩‍👧 end", "a" * 200, "\n\n  x", "Ω" * 50)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(inspect_checkpoint("demo"))


def run(tokenizer, ids, params=None):
    """All text, the finish reason and the stop reason of pushing ``ids``."""
    text = OutputText(tokenizer, params or SamplingParams(), eos_token_ids=EOS)
    pieces = []
    for token_id in ids:
        piece, finish, stop = text.push(token_id)
        pieces.append(piece)
        if finish:
            return "".join(pieces), finish, stop
    return "".join([*pieces, text.finish()]), None, None


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up(tokenizer, text):
    assert run(tokenizer, tokenizer.encode(text)) == (text, None, None)


@pytest.mark.parametrize("seed", range(30))
def test_random_bytes_add_up(tokenizer, seed):
    rng = random.Random(seed)
    ids = [rng.choice((rng.randrange(256), 0xF0, 0x9F, 0x98, 0x80, 65)) for _ in range(40)]
    assert run(tokenizer, ids)[0] == tokenizer.decode(ids)


def test_text_is_not_held_longer_than_it_may_change(tokenizer):
    output = OutputText(tokenizer, SamplingParams(), eos_token_ids=EOS)
    pieces = [output.push(token_id)[0] for token_id in tokenizer.encode("aΩ🙂b")]
    assert pieces == ["a", "", "Ω", "", "", "", "🙂", "b"]
    garbage = [output.push(0xFF)[0] for _ in range(100)]
    assert len("".join(garbage)) >= 97


@pytest.mark.parametrize("seed", range(60))
def test_stop_strings_end_the_text_where_they_begin(tokenizer, seed):
    rng = random.Random(seed)
    text = "".join(rng.choices("abc", k=60))
    stops = tuple("".join(rng.choices("abc", k=rng.randint(1, 5))) for _ in range(rng.randint(1, 3)))
    got, finish, stop = run(tokenizer, tokenizer.encode(text), SamplingParams(stop=stops))
    ends = [(text.find(s) + len(s), s) for s in stops if s in text]
    if not ends:
        assert (got, finish) == (text, None)
        return
    first_end = min(end for end, _ in ends)  # the string that is complete first ends the text
    begins = min(end - len(s) for end, s in ends if end == first_end)
    assert finish == "stop"
    assert stop in stops
    assert got == text[:begins]


def test_ends(tokenizer):
    ids = [65, 66, 256, 67]
    assert run(tokenizer, ids) == ("AB", "stop", None)
    assert run(tokenizer, ids, SamplingParams(ignore_eos=True)) == ("ABC", None, None)
    assert run(tokenizer, ids, SamplingParams(stop_token_ids=(66,))) == ("A", "stop", 66)


def test_min_tokens_puts_stops_off(tokenizer):
    ids = [65, 66, 65, 66, 67]
    assert run(tokenizer, ids, SamplingParams(stop=("B",), min_tokens=3)) == ("ABA", "stop", "B")
    assert run(tokenizer, ids, SamplingParams(stop_token_ids=(66,), min_tokens=3)) == ("ABA", "stop", 66)
