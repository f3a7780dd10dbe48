"""The counters of a server, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKENS = (64, 256, 1024, 4096, 16384, 65536)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "rm_scale_requests", "Requests answered, by route and status.", ["route", "status"], registry=self.registry
        )
        self.refused = Counter(
            "rm_scale_refused", "Requests not served, by reason.", ["reason"], registry=self.registry
        )
        self.seconds = Histogram(
            "rm_scale_request_seconds",
            "From the first byte to the answer.",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.in_flight = Gauge("rm_scale_requests_in_flight", "Requests being served.", registry=self.registry)
        self.queue_tokens = Gauge("rm_scale_queue_tokens", "Tokens that wait to be scored.", registry=self.registry)
        self.scores = Counter("rm_scale_scores", "Texts scored.", registry=self.registry)
        self.tokens = Counter("rm_scale_tokens", "Tokens of the texts scored.", registry=self.registry)
        self.batch_tokens = Histogram(
            "rm_scale_batch_tokens", "Tokens of a forward pass.", buckets=_TOKENS, registry=self.registry
        )
        self.batch_seconds = Histogram(
            "rm_scale_batch_seconds", "Time of a forward pass.", buckets=_SECONDS, registry=self.registry
        )
        self.dropped = Counter(
            "rm_scale_dropped", "Texts dropped before they were scored: nobody waits for them.", registry=self.registry
        )

    def text(self) -> bytes:
        """Return all counters in the text format that Prometheus reads."""
        return generate_latest(self.registry)
