"""What one key may use, by a clock that the tests turn."""

import pytest

from cluster.config import ServerConfig
from cluster.openai_errors import ApiError
from cluster.rate_limit import Places, Tenant, Tenants, TokenBucket, count_tokens
from cluster.slot import Slot
from longctx.errors import RequestError
from longctx.messages import GenerationRequest, SamplingParams


class Clock:
    """Seconds, turned by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make_tenant(clock: Clock, **limits: int) -> Tenant:
    return Tenants(ServerConfig(**limits), has_keys=True, clock=clock).get("a")


def ask(num_prompt: int, max_tokens: int | None, n: int = 1) -> GenerationRequest:
    return GenerationRequest("r", (1,) * num_prompt, SamplingParams(max_tokens=max_tokens, n=n))


def refuse(take, *args, **kwargs) -> ApiError:
    with pytest.raises(ApiError) as caught:
        take(*args, **kwargs)
    assert caught.value.status == 429
    return caught.value


@pytest.mark.parametrize("per_minute", [1, 7, 60, 1000])
def test_a_bucket_gives_a_minute_at_once_and_then_as_it_fills(clock, per_minute):
    bucket = TokenBucket(per_minute, clock)
    for _ in range(per_minute):
        assert bucket.wait_s(1) == 0
        bucket.take(1)
    assert bucket.wait_s(1) == pytest.approx(60 / per_minute, abs=1e-6)
    assert bucket.wait_s(per_minute) == pytest.approx(60)
    clock.now += 60 / per_minute
    assert bucket.wait_s(1) == 0
    bucket.take(1)
    assert bucket.wait_s(1) > 0
    clock.now += 3600
    assert bucket.level == per_minute  # not more, however long it was left alone


def test_a_bucket_takes_back_what_was_not_used(clock):
    bucket = TokenBucket(100, clock)
    bucket.take(80)
    bucket.take(-50)
    assert bucket.level == 70
    bucket.take(-50)
    assert bucket.level == 100
    bucket.take(150)  # used before it was known
    assert bucket.wait_s(10) == pytest.approx(36)


@pytest.mark.parametrize(
    ("ends_s", "now_s", "count", "expected"),
    [
        ([], 0.2, 1, 1.0),  # has just begun
        ([], 20.0, 1, 20.0),  # nothing ended in all this time
        ([], 500.0, 1, 60.0),
        ([1, 2, 3, 4], 8.0, 1, 2.0),
        ([1, 2, 3, 4], 8.0, 3, 6.0),
        ([1, 2, 3, 4, 70, 80], 90.0, 1, 30.0),  # two in the last minute
        ([0.01 * i for i in range(1000)], 10.0, 1, 1.0),
        ([0.01 * i for i in range(1000)], 10.0, 500, 5.0),
    ],
)
def test_when_a_place_is_free_is_estimated(clock, ends_s, now_s, count, expected):
    places, began = Places(10, clock), clock.now
    places.take(10)
    for end_s in ends_s:
        clock.now = began + end_s
        places.give_back(1, is_end=True)
        places.take(1)
    clock.now = began + now_s
    assert places.retry_after_s(count) == pytest.approx(expected, rel=0.02)


def test_idle_time_does_not_count_as_slowness(clock):
    places = Places(1, clock)
    places.take(1)
    places.give_back(1, is_end=True)
    clock.now += 3600
    places.take(1)
    clock.now += 0.5
    assert places.retry_after_s() == 1


def test_requests_of_one_key(clock):
    tenant = make_tenant(clock, key_requests_per_minute=2)
    assert tenant.headers() == [
        (b"x-ratelimit-limit-requests", b"2"),
        (b"x-ratelimit-remaining-requests", b"2"),
        (b"x-ratelimit-reset-requests", b"0s"),
    ]
    tenant.take_requests(1)
    tenant.take_requests(1)
    assert dict(tenant.headers())[b"x-ratelimit-reset-requests"] == b"1m0s"
    clock.now += 0.5
    error = refuse(tenant.take_requests, 1)
    assert (error.kind, error.code) == ("rate_limit_error", "rate_limit_exceeded")
    assert error.headers["retry-after"] == "30"
    assert "key 'a'" in str(error)
    assert "server.key_requests_per_minute" in str(error)
    clock.now += 30
    tenant.take_requests(1)


def test_keys_do_not_use_up_each_others_limits(clock):
    tenants = Tenants(ServerConfig(key_requests_per_minute=1, key_max_requests=1), has_keys=True, clock=clock)
    tenants.get("a").take_requests(1)
    refuse(tenants.get("a").take_requests, 1)
    tenants.get("b").take_requests(1)


def test_places_of_one_key(clock):
    slots = [Slot(Places(9, clock), make_tenant(clock, key_max_requests=2))]
    slots += [Slot(slots[0]._places, slots[0]._tenant) for _ in range(2)]
    slots[0].take(1)
    slots[1].take(1)
    error = refuse(slots[2].take, 1)
    assert "server.key_max_requests" in str(error)
    assert error.code == "rate_limit_exceeded"
    assert slots[0]._places.num_held == 2
    slots[0].give_back()
    slots[0].give_back()  # once is enough
    slots[2].take(1)
    for slot in slots:
        slot.give_back()
    assert slots[0]._places.num_held == slots[0]._tenant.places.num_held == 0


def test_the_servers_places_are_looked_at_first(clock):
    tenant = make_tenant(clock, key_requests_per_minute=5)
    slot = Slot(Places(1, clock), tenant)
    slot.take(1)
    assert refuse(Slot(slot._places, tenant).take, 1).code == "queue_full"
    assert tenant.requests is not None
    assert tenant.requests.level == 4


@pytest.mark.parametrize(
    ("requests", "expected"),
    [
        ([ask(10, 5)], 15),
        ([ask(10, 5, n=4)], 30),
        ([ask(10, 5), ask(20, 5)], 40),
        ([ask(90, 50)], 100),  # there is no room for more in the context
        ([ask(10, None)], 100),
        ([ask(30, None, n=3)], 200),  # all that a minute has
        ([ask(250, None)], 251),  # can never fit
    ],
)
def test_tokens_asked_for(requests, expected):
    context = 100 if len(requests[0].prompt_token_ids) < 100 else 300
    assert count_tokens(requests, max_context=context, most=200) == expected


def test_tokens_of_one_key(clock):
    tenant = make_tenant(clock, key_tokens_per_minute=600)
    slot = Slot(Places(9, clock), tenant)
    slot.take(1)
    slot.charge([ask(100, 400)], max_context=10_000)
    assert tenant.tokens is not None
    assert tenant.tokens.level == 100
    other = Slot(slot._places, tenant)
    other.take(1)
    error = refuse(other.charge, [ask(100, 50)], max_context=10_000)
    assert error.headers["retry-after"] == "5"
    assert "server.key_tokens_per_minute" in str(error)
    with pytest.raises(RequestError, match=r"server\.key_tokens_per_minute") as caught:
        other.charge([ask(100, 501)], max_context=10_000)
    assert caught.value.code == "token_limit_exceeded"
    slot.settle(30)  # of 400
    assert tenant.tokens.level == 470
    slot.settle(30)
    slot.give_back()
    assert tenant.tokens.level == 470
    other.charge([ask(100, 50)], max_context=10_000)
    other.give_back(is_refused=True)
    assert tenant.tokens.level == 470


def test_what_was_refused_later_costs_nothing(clock):
    tenant = make_tenant(clock, key_requests_per_minute=5, key_tokens_per_minute=600)
    slot = Slot(Places(9, clock), tenant)
    slot.take(1)
    slot.take(2)
    slot.charge([ask(10, 10)] * 3, max_context=1000)
    slot.settle(0)
    slot.give_back(is_refused=True)
    assert tenant.requests is not None
    assert tenant.tokens is not None
    assert (tenant.requests.level, tenant.tokens.level, tenant.places.num_held) == (5, 600, 0)


def test_salts_of_two_keys_never_meet():
    pairs = [(name, salt) for name in ("a", "ab", "b") for salt in ("", "a", "b", "\0", "\0a", "b\0", "a\0b")]
    tenants = Tenants(ServerConfig(), has_keys=True)
    assert len({tenants.get(name).salt(salt) for name, salt in pairs}) == len(pairs)
    shared = Tenants(ServerConfig(share_prefix_cache=True), has_keys=True)
    assert shared.get("a").salt("x") == shared.get("b").salt("x") == "x"
    assert Tenants(ServerConfig(), has_keys=False).get("").salt("x") == "x"
