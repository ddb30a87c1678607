"""Policies are functions of what the router knows, and so is the router's guess of what a worker has cached."""

import pytest

from cluster.placed_prefixes import BLOCK_SIZE, PlacedPrefixes, digest_prefix
from cluster.policies import POLICIES
from cluster.policies.policy import WorkerLoad, count_pending
from tests.cluster.small_cluster import make_prompt

ROLES = {"p": "prefill", "d": "decode"}


def load(name, *, node="a", pending=0, requests=0, free=100, cached=0, prompts=0, limit=8192):
    return WorkerLoad(name, node, pending, requests, free, cached, ROLES[name[0]], prompts, limit)


IDLE = [load("d0"), load("d1")]
CASES = {
    "first of equals": ([load("p0"), load("p1")], IDLE, ("p0", "d0")),
    "no prefill worker": ([], IDLE, (None, "d0")),
    "fewer tokens before it": ([load("p0", pending=500), load("p1", pending=499)], IDLE, ("p1", "d0")),
    "cached prefix": ([load("p0"), load("p1", cached=64)], IDLE, ("p1", "d0")),
    "cached prefix worth waiting for": ([load("p0"), load("p1", pending=500, cached=640)], IDLE, ("p1", "d0")),
    "cached prefix not worth it": ([load("p0"), load("p1", pending=700, cached=640)], IDLE, ("p0", "d0")),
    "same node": ([load("p0", node="b"), load("p1")], IDLE, ("p1", "d0")),
    "same node as the chosen generator": (
        [load("p0"), load("p1", node="b")],
        [load("d0", requests=1), load("d1", node="b")],
        ("p1", "d1"),
    ),
    "queue before node": ([load("p0", node="b"), load("p1", pending=1)], IDLE, ("p0", "d0")),
    "fewer requests": ([], [load("d0", requests=2, free=100), load("d1", requests=1, free=1)], (None, "d1")),
    "requests before cached prefix": ([], [load("d0", requests=1, cached=640), load("d1")], (None, "d1")),
    "less to ship": ([], [load("d0", free=100), load("d1", free=1, cached=64)], (None, "d1")),
    "more free pages": ([], [load("d0", free=9), load("d1", free=10)], (None, "d1")),
}


@pytest.mark.parametrize("case", CASES)
def test_shortest_queue(case):
    prefill, decode, expected = CASES[case]
    computer, generator = POLICIES.get("shortest_queue")().choose(prefill, decode, num_tokens=1000)
    assert (computer and computer.name, generator.name) == expected


P0, P1, D0, D1 = load("p0"), load("p1"), load("d0"), load("d1")
BUSY = {"pending": 7500, "prompts": 3}  # a prompt of 1,000 more is too much
POOLS = {
    "everybody at home": ([P0, P1, D0, D1], [], ("p0", "d0")),
    "the prompt pool before the mixed one": ([load("p0", pending=7000), load("p1", requests=1), D0], [], ("p0", "d0")),
    "the mixed pool before the token pool": (
        [load("p0", **BUSY), load("d0", pending=10, prompts=1), D1], [], ("d0", "d1"),
    ),
    "a worker of the token pool": ([load("p0", **BUSY), load("d0", requests=9), D1], [], ("d1", "d1")),
    "one that has its own queue": (
        [load("p0", **BUSY), load("d0", pending=5, requests=1), load("d1", requests=2)], [], ("d1", "d0"),
    ),
    "long queues everywhere": (
        [load("p0", **BUSY), load("d0", pending=7600, prompts=1), load("d1", pending=7400, prompts=1)],
        [], ("d1", "d0"),
    ),
    "an idle worker takes a prompt of any length": ([load("p0", limit=10), D0], [], ("p0", "d0")),
    "what is cached makes no queue": ([load("p0", pending=7500, prompts=1, cached=640), D0], [], ("p0", "d0")),
    "tokens in the mixed pool": ([P0, P1, load("d0", prompts=1), D1], ["d1"], ("p0", "d0")),
    "tokens in the prompt pool": ([load("p0", pending=10, prompts=1), P1, D0], ["d0"], ("p1", "p0")),
    "home again": ([P0, load("d0", pending=10, prompts=0, requests=3)], [], ("p0", "d0")),
    "no token worker": ([P0, P1], [], ("p0", "p0")),
    "no prompt worker": ([D0, D1], [], ("d0", "d0")),
}  # fmt: skip


@pytest.mark.parametrize("case", POOLS)
def test_splitwise(case):
    workers, full, expected = POOLS[case]
    decode = [worker for worker in workers if worker.name not in full]
    computer, generator = POLICIES.get("splitwise")().choose(workers, decode, num_tokens=1000)
    assert (computer.name, generator.name) == expected


SESSIONS = {
    "most of it is cached": ([load("d0"), load("d1", requests=4, cached=512)], "d1"),
    "the longest": ([load("d0", cached=512), load("d1", requests=4, cached=768)], "d1"),
    "the least busy of equals": ([load("d0", requests=2, cached=512), load("d1", requests=1, cached=512)], "d1"),
    "too little of it is": ([load("d0"), load("d1", requests=1, cached=448)], "d0"),
    "too busy": ([load("d0"), load("d1", requests=5, cached=960)], "d0"),
    "all are busy": ([load("d0", requests=20), load("d1", requests=30, cached=960)], "d1"),
    "nothing is cached": ([load("d0", requests=1), load("d1")], "d1"),
}


@pytest.mark.parametrize("case", SESSIONS)
def test_cache_aware(case):
    decode, expected = SESSIONS[case]
    _, generator = POLICIES.get("cache_aware")().choose([], decode, num_tokens=1000)
    assert generator.name == expected


@pytest.mark.parametrize("name", tuple(POLICIES))
def test_every_policy_picks_from_what_it_is_given(name):
    policy = POLICIES.get(name)()
    prefill, decode = [load("p0", pending=7)], [load("d0", requests=3, free=0)]
    assert policy.choose(prefill, decode, num_tokens=1) == (prefill[0], decode[0])
    assert policy.choose([], decode, num_tokens=1) == (None, decode[0])


@pytest.mark.parametrize(
    "prompts, num_tokens, expected",
    [
        ([], 100, 0),
        ([50, 200], 100, 250),
        ([500_000], 100, 100),  # the new one has every other token
        ([500_000, 50], 100, 200),
        ([300], 100, 100),
        ([300, 500_000], 200_000, 200_600),
    ],
)
def test_what_is_computed_before_a_prompt(prompts, num_tokens, expected):
    assert count_pending(prompts, num_tokens) == expected


@pytest.mark.parametrize(
    "length, salt, known",
    [
        (5 * BLOCK_SIZE, "", 5),
        (5 * BLOCK_SIZE - 1, "", 4),
        (BLOCK_SIZE - 1, "", 0),
        (9 * BLOCK_SIZE, "", 6),  # 6 and a half were placed
        (5 * BLOCK_SIZE, "other", 0),
    ],
)
def test_a_placed_prefix_is_known(length, salt, known):
    prompt = make_prompt(0, 9 * BLOCK_SIZE)
    prefixes = PlacedPrefixes()
    prefixes.add(digest_prefix(prompt[: 6 * BLOCK_SIZE + BLOCK_SIZE // 2]), max_tokens=1 << 20)
    assert prefixes.count_tokens(digest_prefix(prompt[:length], salt)) == known * BLOCK_SIZE


def test_another_token_ends_the_known_prefix():
    prompt = make_prompt(0, 4 * BLOCK_SIZE)
    prefixes = PlacedPrefixes()
    prefixes.add(digest_prefix(prompt), max_tokens=1 << 20)
    prompt[2 * BLOCK_SIZE] ^= 1
    assert prefixes.count_tokens(digest_prefix(prompt)) == 2 * BLOCK_SIZE


def test_what_was_used_longest_ago_is_forgotten_tail_first():
    first, second, third = (digest_prefix(make_prompt(seed, 4 * BLOCK_SIZE)) for seed in range(3))
    prefixes = PlacedPrefixes()
    for digests in (first, second, first, third):
        prefixes.add(digests, max_tokens=10 * BLOCK_SIZE)
    assert [prefixes.count_tokens(digests) // BLOCK_SIZE for digests in (first, second, third)] == [4, 2, 4]
    prefixes.add(first, max_tokens=2 * BLOCK_SIZE)  # a pool smaller than the prompt
    assert [prefixes.count_tokens(digests) // BLOCK_SIZE for digests in (first, second, third)] == [2, 0, 0]
    prefixes.clear()
    assert prefixes.count_tokens(first) == 0
