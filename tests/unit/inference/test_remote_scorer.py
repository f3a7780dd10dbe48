"""The remote scorer against a server that answers what it is told to: retries, splitting, and what errors say."""

from __future__ import annotations

import json
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rm_scale.errors import DataError
from rm_scale.files import free_port
from rm_scale.inference.http_client import RemoteError
from rm_scale.inference.remote_scorer import RemoteScorer, Unscorable
from tests.support.serving import wait_for

Answer = tuple[int, Any, dict[str, str]]


def score_all(body: Any) -> Answer:
    """Each score is the length of its completion."""
    scores = [float(len(item["completion"])) for item in body["items"]]
    return 200, {"scores": scores, "normalized_scores": None}, {}


class Script:
    """A server on this machine that follows a list of answers, then scores.

    Attributes:
        answers: for the next requests, in turn: status, JSON (or bytes), headers.
        bodies, headers: what was received.
    """

    def __init__(self) -> None:
        self.answers: list[Answer | Callable[[Any], Answer]] = []
        self.bodies: list[Any] = []
        self.headers: list[dict[str, str]] = []
        script = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                script.bodies.append(body)
                script.headers.append(dict(self.headers))
                answer = script.answers.pop(0) if script.answers else score_all
                status, content, headers = answer(body) if callable(answer) else answer
                if status == 0:  # hang up
                    self.connection.close()
                    return
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def script() -> Iterator[Script]:
    script = Script()
    yield script
    script.server.shutdown()
    script.server.server_close()


UNREADABLE = ("http://h:abc", "http://[::1", "http://h:99999", "http://h:-1", "http://h\x01", "http://xn--a")
"""Addresses that the libraries below end with an error of their own for."""


def quick(url: str, **options: Any) -> RemoteScorer:
    return RemoteScorer(url, **{"backoff_seconds": 0.01, "max_retries": 3, **options})


def problem(detail: str, reason: str) -> dict[str, str]:
    return {"detail": detail, "reason": reason}


# --- Trying again ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [429, 502, 503, 504, 0])
def test_what_may_pass_is_tried_again(script: Script, failure: int) -> None:
    script.answers = [(failure, problem("busy", "queue_full"), {})] * 2
    assert quick(script.url).score(["a", "b"], ["c", "de"]) == [1.0, 2.0]
    assert len(script.bodies) == 3


def test_a_server_that_starts_late_is_waited_for() -> None:
    port = free_port()
    with pytest.raises(RemoteError) as caught:
        quick(f"http://127.0.0.1:{port}").score(["a"], ["b"])
    expected = f"http://127.0.0.1:{port}/score: no score after 4 tries, the last one ended with ConnectError"
    assert expected in str(caught.value)
    assert f"Fix: see that rm-scale serve runs there (curl http://127.0.0.1:{port}/ready)" in str(caught.value)


@pytest.mark.parametrize("value", ["1", lambda: formatdate(time.time() + 2, usegmt=True)])
def test_retry_after_is_honoured(script: Script, value: Any) -> None:
    script.answers = [(429, problem("busy", "queue_full"), {"Retry-After": value() if callable(value) else value})]
    started = time.monotonic()
    assert quick(script.url).score(["a"], ["b"]) == [1.0]
    assert time.monotonic() - started >= 0.9


def test_waits_double_up_to_a_limit_with_jitter() -> None:
    remote = RemoteScorer("http://127.0.0.1:1", backoff_seconds=1.0, max_backoff_seconds=4.0)
    for tries, longest in enumerate([1, 2, 4, 4, 4]):
        waits = {remote.client._wait_seconds(tries, None) for _ in range(20)}
        assert longest / 2 <= min(waits) and max(waits) <= longest and len(waits) > 1
    assert 10 < remote.client._wait_seconds(0, 10.0) <= 11
    assert remote.client._wait_seconds(0, 1e9) <= 121  # whatever a server says, an hour is not waited


def test_retries_end_and_say_how_it_went(script: Script) -> None:
    script.answers = [(503, problem("the server is stopping. Fix: ask another one.", "stopping"), {})] * 9
    with pytest.raises(RemoteError, match=r"after 4 tries, .* status 503, the server is stopping\. .*max_retries"):
        quick(script.url).score(["a"], ["b"])
    assert len(script.bodies) == 4


def test_a_server_that_hangs_is_asked_twice(script: Script) -> None:
    """Not `max_retries` times: each costs all of `timeout_seconds`."""
    release = threading.Event()

    def hang(body: Any) -> Answer:
        release.wait(60)
        return score_all(body)

    script.answers = [hang] * 4
    remote = quick(script.url, timeout_seconds=0.1, max_retries=8)
    try:
        with pytest.raises(RemoteError, match=r"no answer within 0\.1 s, twice\. Fix: .*\(curl .*timeout_seconds"):
            remote.score(["a"], ["b"])
        wait_for(lambda: len(script.bodies) >= 2)
        assert len(script.bodies) == 2
    finally:
        release.set()


# --- Splitting -------------------------------------------------------------------------------------------------------


def test_many_are_asked_in_parts(script: Script) -> None:
    completions = ["x" * length for length in range(1, 11)]
    assert quick(script.url, items_per_request=4).score(["p"] * 10, completions) == [float(n) for n in range(1, 11)]
    assert [len(body["items"]) for body in script.bodies] == [4, 4, 2]
    script.bodies.clear()
    quick(script.url, bytes_per_request=120).score(["p"] * 4, ["x" * 50, "x" * 40, "x" * 500, "y"])
    assert [len(body["items"]) for body in script.bodies] == [1, 1, 1, 1]


def test_what_is_too_large_is_halved(script: Script) -> None:
    def at_most_two(body: Any) -> Answer:
        return score_all(body) if len(body["items"]) <= 2 else (413, problem("at most 2", "items"), {})

    script.answers = [at_most_two] * 20
    assert quick(script.url).score(["p"] * 7, ["x" * n for n in range(1, 8)]) == [float(n) for n in range(1, 8)]
    script.answers = [(413, problem("larger than 10 bytes", "body"), {})] * 3
    with pytest.raises(RemoteError, match=r"/score: status 413, larger than 10 bytes Fix: raise the server's limits"):
        quick(script.url).score(["p"], ["x"])


def test_what_can_not_be_scored_is_named_and_left_out(script: Script) -> None:
    def refuse_long(body: Any) -> Answer:
        for number, item in enumerate(body["items"]):
            if len(item["completion"]) > 3:
                return 422, problem(f"item {number}: too long: 9 tokens. Fix: shorten.", "over_long"), {}
        return score_all(body)

    script.answers = [refuse_long] * 20
    completions = ["a", "long one", "bb", "long two", "ccc"]
    found = quick(script.url, items_per_request=3).try_score(["p"] * 5, completions)
    why = Unscorable("over_long", "too long: 9 tokens. Fix: shorten.")
    assert found == [1.0, why, 2.0, why, 3.0]
    with pytest.raises(DataError, match=r"completion 1: too long: 9 tokens\. Fix: shorten\."):
        quick(script.url).score(["p"] * 5, completions)


# --- What goes along -------------------------------------------------------------------------------------------------


def test_the_token_comes_from_the_environment_and_is_never_shown(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = quick(script.url, token_env="MY_TOKEN")
    script.answers = [(401, problem("no valid token.", "unauthorized"), {})] * 2
    with pytest.raises(RemoteError, match=r"status 401, no valid token\. Fix: MY_TOKEN in the environment is not set"):
        remote.score(["a"], ["b"])
    assert "Authorization" not in script.headers[-1]
    monkeypatch.setenv("MY_TOKEN", "s3cret")
    with pytest.raises(
        RemoteError, match="MY_TOKEN in the environment is set, but not what the server wants"
    ) as caught:
        remote.score(["a"], ["b"])
    assert script.headers[-1]["Authorization"] == "Bearer s3cret"
    assert "s3cret" not in str(caught.value) and b"s3cret" not in pickle.dumps(remote)
    asked = len(script.headers)
    for wrong, why in (("", "is empty"), (" \n", "is empty"), ("pässwort", "ASCII"), ("a\nb", "several lines")):
        monkeypatch.setenv("MY_TOKEN", wrong)
        with pytest.raises(RemoteError, match=f"MY_TOKEN in the environment: .*{why}"):
            remote.score(["a"], ["b"])
    assert len(script.headers) == asked, "nothing is sent"


def test_texts_messages_and_tools_are_sent_as_they_are(script: Script) -> None:
    messages = [{"role": "user", "content": "数 🎉"}]
    said = [{"role": "assistant", "content": "é"}]
    quick(script.url).score(["p", messages], ["c", said], tools=[None, [{"name": "f"}]])
    expected = [
        {"prompt": "p", "completion": "c"},
        {"prompt": messages, "completion": said, "tools": [{"name": "f"}]},
    ]
    assert script.bodies == [{"items": expected}]
    assert quick(script.url).score([], []) == [] and len(script.bodies) == 1


def test_it_goes_to_other_processes_without_its_connections(script: Script) -> None:
    remote = quick(script.url)
    remote.score(["a"], ["b"])
    copied = pickle.loads(pickle.dumps(remote))
    assert copied.score(["a"], ["bb"]) == [2.0]
    remote.close()
    assert remote.score(["a"], ["bbb"]) == [3.0]


# --- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, {"detail": "Not Found"}, {}), r"status 404, Not Found Fix: give the server's address without a path"),
        ((307, b"", {"Location": "http://127.0.0.1:1/"}), r"status 307, .*Fix: .* it is not followed, since the token"),
        ((500, b"<html> oh\n no", {}), r"status 500, <html> oh no Fix: see the server's log"),
        (
            (422, {"detail": "items: bad. Fix: see /docs.", "reason": "invalid"}, {}),
            r"422, items: bad\. Fix: see /docs",
        ),
        ((200, b"<html>hello", {}), r"the answer is no JSON object \(<html>hello\)\. Fix: is it rm-scale serve"),
        ((200, {"scores": [1.0]}, {}), r"does not hold 2 finite scores \(it holds scores\)\. Fix: is it rm-scale"),
        ((200, {"scores": [1.0, None]}, {}), r"does not hold 2 finite scores"),
        ((200, b'{"scores": [1.0, NaN]}', {}), r"does not hold 2 finite scores"),
        ((200, {"rewards": [1.0, 2.0]}, {}), r"does not hold 2 finite scores \(it holds rewards\)"),
    ],
)
def test_wrong_answers_are_not_tried_again(script: Script, answer: Answer, message: str) -> None:
    script.answers = [answer]
    with pytest.raises(RemoteError, match=message) as caught:
        quick(script.url).score(["a", "b"], ["c", "d"])
    assert f"{script.url}/score" in str(caught.value)
    assert len(script.bodies) == 1


def test_a_model_without_mean_and_deviation_can_not_be_normalised(script: Script) -> None:
    with pytest.raises(RemoteError, match=r"has no score_mean and score_std .* Fix: raw scores, or serve a model that"):
        quick(script.url).score(["a"], ["b"], normalized=True)


def test_wrong_requests_are_explained(script: Script) -> None:
    for url in ("127.0.0.1:8000", "ftp://host", "http://", "http://host?x=1", *UNREADABLE):
        with pytest.raises(RemoteError, match=r"is no address of a server.*\. Fix: http://HOST:PORT"):
            RemoteScorer(url)
    with pytest.raises(
        RemoteError, match=r"url=http://h:abc: is no address of a server, its host or port can't be read"
    ):
        RemoteScorer("http://h:abc")
    with pytest.raises(RemoteError, match=r"holds a name or password\. Fix: put the token into the env") as caught:
        RemoteScorer("http://me:s3cret@host:1")
    assert "s3cret" not in str(caught.value)
    for url in ("http://me:s3cret@host:abc", "http://me:s3cret@[::1", "http://me:s3cret/@host"):
        with pytest.raises(RemoteError) as caught:
            RemoteScorer(url)
        assert "s3cret" not in str(caught.value)
    remote = quick(script.url)
    with pytest.raises(DataError, match="2 prompts and 1 completions: give one prompt per completion"):
        remote.score(["a", "b"], ["c"])
    with pytest.raises(DataError, match=r"prompts and completions are lists\. Fix: \[prompt\]"):
        remote.score("a", "b")
    with pytest.raises(DataError, match=r"neither text nor messages of JSON values .* Fix: text, or a list of"):
        remote.score(["a"], [[{"role": "assistant", "content": object()}]])
    assert script.bodies == []
    assert RemoteScorer(f"{script.url}/").url == script.url
    assert RemoteScorer(f"{script.url}/score").url == script.url
