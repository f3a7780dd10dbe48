"""When a request is refused for its size, number, rate or the queue's length, and with which status."""

from __future__ import annotations

import pytest

from rm_scale.inference.server.request_limits import (
    RateLimit,
    Refused,
    require_few_texts,
    require_short_queue,
    require_small_body,
)
from rm_scale.inference.server.server_options import ServerOptions

OPTIONS = ServerOptions(max_body_bytes=10, max_items=2, max_queue_tokens=100)


def test_too_much_in_one_request_is_413() -> None:
    require_small_body(10, OPTIONS)
    require_few_texts(2, OPTIONS)
    with pytest.raises(Refused, match="larger than 10 bytes") as body:
        require_small_body(11, OPTIONS)
    with pytest.raises(Refused, match="3 texts, at most 2") as texts:
        require_few_texts(3, OPTIONS)
    assert (body.value.status, texts.value.status) == (413, 413)
    assert (body.value.reason, texts.value.reason) == ("body", "items")


def test_a_full_queue_is_429_and_says_when_to_try_again() -> None:
    require_short_queue(60, 40, 0.0, OPTIONS)
    require_short_queue(0, 1000, 0.0, OPTIONS)  # nothing waits: it would never be served otherwise
    waits = []
    for tokens_per_second in (0.0, 30.0, 0.001):
        with pytest.raises(Refused, match="60 tokens wait already, and at most 100 may") as refused:
            require_short_queue(60, 41, tokens_per_second, OPTIONS)
        assert (refused.value.status, refused.value.reason) == (429, "queue_full")
        waits.append(refused.value.retry_after_seconds)
    assert waits == [1.0, 2.0, 60.0]


def test_a_client_that_asks_too_often_is_429() -> None:
    rate = RateLimit(1)
    rate.require("a")
    rate.require("b")
    with pytest.raises(Refused, match="more than 1 requests per second") as refused:
        rate.require("a")
    assert refused.value.status == 429 and 0 < (refused.value.retry_after_seconds or 0) <= 1


def test_rate_limit_is_a_bucket() -> None:
    rate = RateLimit(2, max_clients=2)
    assert [rate.take("a", 0.0) for _ in range(3)] == [0.0, 0.0, pytest.approx(0.5)]
    assert rate.take("a", 0.5) == 0.0 and rate.take("b", 0.5) == 0.0
    rate.take("c", 0.6)
    assert list(rate._buckets) == ["b", "c"], "the one that was longest silent is forgotten"
