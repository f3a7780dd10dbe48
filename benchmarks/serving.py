"""The server under load: its throughput beside offline scoring, and a long mix of good and bad clients.

    python benchmarks/serving.py --model REWARD_MODEL_DIR --data HH.jsonl.gz [--clients 32] [--minutes 10]
    python benchmarks/serving.py --model DIR --data FILE --parts mixed --minutes 10
    python benchmarks/serving.py --model DIR --data FILE --parts endpoint --texts 128

`throughput`: the same texts by `RewardScorer` in this process and over HTTP by so many clients at once, one text per
request, in turns; medians, and the ratio. Both sides have the machine's cores to themselves in their turn; the clients
run on the same cores as the server. `endpoint`: the same for what `rm-scale score` runs for a chunk of a file, with the
model in this process and with `--endpoint` at the server. Each round has texts of its own, since the server remembers
scores. `mixed`: for so many minutes clients that send good texts (each score is compared
with the offline one), over-long and malformed ones, bodies that stop in the middle, and connections that are closed
before the answer; then SIGTERM in full flow. Counts wrong scores, lost requests, and memory over time. Loopback only.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

OUTPUT = REPOSITORY / "benchmarks" / "results" / "cpu" / "serving.json"
PARTS = ("throughput", "endpoint", "mixed")
MAX_TOKENS = 4096
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


@dataclass(frozen=True)
class Text:
    """One completion to score."""

    prompt: str
    completion: str


def read_texts(path: Path) -> list[Text]:
    """Return completions of HH pairs, each with its prompt."""
    texts = []
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        for line in stream:
            row = json.loads(line)
            for side in ("chosen", "rejected"):
                place = row[side].rfind(ASSISTANT) + len(ASSISTANT)
                texts.append(Text(row[side][:place], row[side][place:]))
    return [text for text in texts if len(text.prompt) + len(text.completion) < 2500]


@contextmanager
def server(model: str, *arguments: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Start `rm-scale serve` on a free port of this machine, and wait until it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "rm_scale.cli", "serve", "--model", model, "--port", str(port)]
    process = subprocess.Popen([*command, "--max_tokens_per_batch", str(MAX_TOKENS), *arguments], cwd=REPOSITORY)
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 300
        while True:
            try:
                if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit("the server did not start")
            time.sleep(0.2)
        yield url, process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def offline(model: str, texts: list[Text], dtype: str | None = None) -> tuple[Any, list[float]]:
    """Return the model in this process, and its scores."""
    from rm_scale.inference.scoring.scorer import RewardScorer

    scorer = RewardScorer.from_pretrained(model, dtype=dtype, device="cpu")
    return scorer, scorer.score([t.prompt for t in texts], [t.completion for t in texts], max_tokens=MAX_TOKENS)


def ask(client: httpx.Client, url: str, text: Text) -> httpx.Response:
    """Ask for the score of one text."""
    return client.post(f"{url}/score", json={"prompt": text.prompt, "completion": text.completion}, timeout=120)


# --- Throughput ------------------------------------------------------------------------------------------------------


def over_http(url: str, texts: list[Text], num_clients: int) -> list[float]:
    """Return the scores of all texts, shared out among so many clients."""
    scores = [0.0] * len(texts)

    def client(number: int) -> None:
        with httpx.Client(verify=False) as connection:
            for place in range(number, len(texts), num_clients):
                answer = ask(connection, url, texts[place])
                answer.raise_for_status()
                scores[place] = answer.json()["scores"][0]

    with ThreadPoolExecutor(num_clients) as pool:
        list(pool.map(client, range(num_clients)))
    return scores


def measure_throughput(options: argparse.Namespace, texts: list[Text]) -> dict[str, Any]:
    """Measure offline and over HTTP in turns."""
    scorer, _ = offline(options.model, texts[:1], options.dtype)

    def here(some: list[Text]) -> list[float]:
        found = scorer.score([t.prompt for t in some], [t.completion for t in some], max_tokens=MAX_TOKENS)
        return list(found)

    with server(options.model, *_typed(options)) as (url, _):
        rounds = in_turns(options, texts, here, lambda some: over_http(url, some, options.clients))
    return {"num_texts": options.texts, "num_clients": options.clients, **rounds}


def in_turns(
    options: argparse.Namespace,
    texts: list[Text],
    here: Callable[[list[Text]], list[float]],
    there: Callable[[list[Text]], list[float]],
) -> dict[str, Any]:
    """Score the texts of each round on both sides, one after the other; the first round warms them up."""
    if len(texts) < options.texts * (options.rounds + 1):
        raise SystemExit(f"{options.data}: {len(texts)} texts are too few. Fix: fewer --texts or --rounds.")
    rounds = []
    for number in range(options.rounds + 1):
        some = texts[number * options.texts : (number + 1) * options.texts]
        started = time.perf_counter()
        expected = here(some)
        between = time.perf_counter()
        scores = there(some)
        alone, served = between - started, time.perf_counter() - between
        worst = max(abs(a - b) for a, b in zip(expected, scores, strict=True))
        print(f"{len(some)} texts: here {alone:.2f} s, at the server {served:.2f} s", flush=True)
        if number:
            rounds.append({"offline_seconds": alone, "served_seconds": served, "largest_difference": worst})
    ratio = statistics.median(one["offline_seconds"] / one["served_seconds"] for one in rounds)
    print(f"throughput at the server over that here: {ratio:.2f}")
    return {"rounds": rounds, "median_ratio": ratio}


def _typed(options: argparse.Namespace) -> list[str]:
    return ["--dtype", options.dtype] if options.dtype else []


# --- A chunk of a file at the server ---------------------------------------------------------------------------------


def measure_endpoint(options: argparse.Namespace, texts: list[Text]) -> dict[str, Any]:
    """Measure a chunk of `rm-scale score` with the model here and with `--endpoint`, in turns."""
    from rm_scale.inference.endpoint_scorer import EndpointScorer
    from rm_scale.inference.scoring.batch_scoring import ScoringJob, score_rows
    from rm_scale.inference.scoring.ensemble import Ensemble

    scorer, _ = offline(options.model, texts[:1], options.dtype)
    encoded = scorer.encoder.encode_many([text.prompt for text in texts], [text.completion for text in texts])
    texts = [text for text, ids in zip(texts, encoded, strict=True) if isinstance(ids, list)]
    at_once = ScoringJob(Path("not-written.jsonl"), {}, max_tokens=MAX_TOKENS)
    # As the command: a server has batches of its own, and is kept busy by as many texts as a chunk has.
    chunk = ScoringJob(at_once.output, {}, block_rows=at_once.chunk_rows, max_tokens=MAX_TOKENS)

    def scored(some: list[Text], ensemble: Ensemble, job: ScoringJob) -> list[float]:
        rows = [(n, {"prompt": text.prompt, "completion": text.completion}) for n, text in enumerate(some)]
        return [row["score"] for row in score_rows(rows, ensemble, job)]

    with server(options.model, *_typed(options)) as (url, _):
        remote = EndpointScorer.from_folder(options.model, url, dtype=options.dtype)
        rounds = in_turns(
            options,
            texts,
            lambda some: scored(some, Ensemble([scorer]), at_once),
            lambda some: scored(some, Ensemble([remote]), chunk),
        )
    how = {"texts_per_request": remote.texts_per_request, "requests_in_flight": remote.requests_in_flight}
    return {"num_texts": options.texts, **how, **rounds}


# --- Mixed load ------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What came of all requests."""

    statuses: Counter[str] = field(default_factory=Counter)
    num_wrong: int = 0
    num_lost: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, kind: str, status: object) -> None:
        with self.lock:
            self.statuses[f"{kind} {status}"] += 1


def good_client(url: str, texts: list[Text], expected: list[float], tally: Tally, until: float, seed: int) -> None:
    """Require that every answer is this text's score; a refusal for lack of room is an answer, silence is a loss."""
    chance = random.Random(seed)
    with httpx.Client(verify=False) as connection:
        while time.monotonic() < until:
            place = chance.randrange(len(texts))
            try:
                answer = ask(connection, url, texts[place])
            except httpx.TransportError:
                with tally.lock:
                    tally.num_lost += 1
                continue
            tally.count("good", answer.status_code)
            if answer.status_code == 200 and abs(answer.json()["scores"][0] - expected[place]) > 5e-2:
                with tally.lock:
                    tally.num_wrong += 1


def bad_client(url: str, texts: list[Text], tally: Tally, until: float, seed: int) -> None:
    """Send over-long and malformed requests and half of a body, and close connections before the answer."""
    chance = random.Random(seed)
    host, port = url.removeprefix("http://").split(":")
    bodies = (
        b"{",
        b'{"prompt": 1}',
        b'{"items": []}',
        b"\xff",
        b'{"prompt": "a", "completion": "' + b"7 " * 9000 + b'"}',
    )
    while time.monotonic() < until:
        kind = chance.choice(("malformed", "half", "leaves"))
        if kind == "malformed":
            try:
                answer = httpx.post(f"{url}/score", content=chance.choice(bodies), timeout=60)
                tally.count(kind, answer.status_code)
            except httpx.TransportError as error:
                tally.count(kind, type(error).__name__)
        else:
            text = texts[chance.randrange(len(texts))]
            body = json.dumps({"items": [{"prompt": text.prompt, "completion": text.completion}] * 4}).encode()
            head = "POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            head += f"Content-Length: {len(body)}\r\n\r\n"
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(head.encode() + (body[: len(body) // 2] if kind == "half" else body))
                time.sleep(chance.uniform(0, 0.5))
            tally.count(kind, "closed")
        time.sleep(chance.uniform(0, 0.3))


def measure_mixed(options: argparse.Namespace, texts: list[Text]) -> dict[str, Any]:
    """Measure minutes of load, memory on the way, and a signal at the end."""
    texts = texts[: options.texts]
    _, expected = offline(options.model, texts)
    tally, memory = Tally(), []
    with server(options.model, "--body_timeout", "5") as (url, process):
        until = time.monotonic() + 60 * options.minutes
        watched = psutil.Process(process.pid)
        with ThreadPoolExecutor(options.clients) as pool:
            for seed in range(options.clients):
                if seed % 4:
                    pool.submit(good_client, url, texts, expected, tally, until, seed)
                else:
                    pool.submit(bad_client, url, texts, tally, until, seed)
            while time.monotonic() < until:
                memory.append(watched.memory_info().rss)
                time.sleep(2)
        terminated = terminate(url, process, texts, expected)
    half = len(memory) // 2
    growth = (
        statistics.median(memory[-len(memory) // 4 :]) / statistics.median(memory[half : half + len(memory) // 4]) - 1
    )
    result = {
        "minutes": options.minutes,
        "num_clients": options.clients,
        "statuses": dict(sorted(tally.statuses.items())),
        "num_wrong_scores": tally.num_wrong,
        "num_lost_requests": tally.num_lost,
        "memory_bytes": {"first": memory[0], "middle": memory[half], "last": memory[-1]},
        "memory_growth_third_to_last_quarter": growth,
        "terminated": terminated,
    }
    print(json.dumps(result, indent=2))
    return result


def terminate(url: str, process: subprocess.Popen[bytes], texts: list[Text], expected: list[float]) -> dict[str, Any]:
    """Send SIGTERM while 16 clients wait: each that was let in gets its score."""
    outcomes: Counter[str] = Counter()
    begun = threading.Event()

    def client(number: int) -> None:
        for place in range(number, len(texts), 16):
            begun.set()
            try:
                with httpx.Client(verify=False) as connection:
                    answer = ask(connection, url, texts[place])
            except httpx.ConnectError:
                outcomes["not accepted"] += 1
                return
            except httpx.TransportError:
                outcomes["lost"] += 1
                return
            outcomes[str(answer.status_code)] += 1
            if answer.status_code == 200 and abs(answer.json()["scores"][0] - expected[place]) > 5e-2:
                outcomes["wrong"] += 1
            if answer.status_code == 503:
                return

    with ThreadPoolExecutor(16) as pool:
        for number in range(16):
            pool.submit(client, number)
        begun.wait()
        time.sleep(1.0)
        os.kill(process.pid, signal.SIGTERM)
    return {"exit_code": process.wait(60), **outcomes}


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a reward model")
    parser.add_argument("--data", required=True, help="HH pairs, .jsonl.gz")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="on both sides; default: the folder's")
    parser.add_argument("--output", default=str(OUTPUT))
    options = parser.parse_args()
    texts = read_texts(Path(options.data))
    output = Path(options.output)
    record = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    for part in options.parts:
        measure = {"throughput": measure_throughput, "endpoint": measure_endpoint, "mixed": measure_mixed}[part]
        model = Path(options.model).name
        name = " ".join(filter(None, (part, model if part == "endpoint" else None, options.dtype)))
        record[name] = {"model": model, "max_tokens": MAX_TOKENS, **measure(options, texts)}
        output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
