"""The metrics that Prometheus reads at /metrics."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from blockinfer.llm import LLM
from blockinfer.outputs import RequestOutput

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """One server's metrics. Gauges are read from the engine on each scrape."""

    def __init__(self, llm: LLM) -> None:
        self.registry = registry = CollectorRegistry()
        named = dict(registry=registry, namespace="blockinfer")
        self._requests = Counter(
            "requests", "HTTP requests to an endpoint of /v1, by how they ended", ["endpoint", "status"], **named
        )
        self._prompt_tokens = Counter("prompt_tokens", "Tokens of finished requests' prompts", **named)
        self._tokens = Counter("generated_tokens", "Tokens of finished requests' answers", **named)
        self._request_forwards = Counter("request_forwards", "Forwards of finished requests", **named)
        self._tokens_per_forward = Histogram(
            "tokens_per_forward",
            "Tokens per forward of finished requests",
            buckets=(0.5, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32),
            **named,
        )
        timed = named | {"buckets": _SECONDS}
        self._first_block = Histogram("first_block_seconds", "From arrival to the first block", **timed)
        self._between = Histogram("between_blocks_seconds", "Between two blocks of a stream", **timed)
        self._whole = Histogram("request_seconds", "From arrival to the end of an answer", **timed)
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "requests_running": ("Requests that are running", lambda: len(llm.engine.scheduler.running)),
            "requests_waiting": ("Requests in the queue", lambda: len(llm.engine.scheduler.waiting)),
            "kv_pages": ("Pages of the KV cache", lambda: llm.engine.pool.num_pages),
            "kv_pages_used": ("Pages in use", lambda: llm.engine.pool.num_pages - llm.engine.pool.num_free),
            "model_forwards": ("Forwards of the model so far", lambda: llm.engine.runner.stats.forwards),
        }
        for name, (what, read) in gauges.items():
            Gauge(name, what, **named).set_function(read)

    def answered(self, endpoint: str, status: int | str) -> None:
        """status: HTTP's, or "aborted" if the client went away, or "failed" if a stream broke off."""
        self._requests.labels(endpoint, str(status)).inc()

    def between_blocks(self, seconds: float) -> None:
        self._between.observe(seconds)

    def finished(self, output: RequestOutput) -> None:
        tokens = sum(len(one.token_ids) for one in output.outputs)
        self._prompt_tokens.inc(len(output.prompt_token_ids))
        self._tokens.inc(tokens)
        self._request_forwards.inc(output.metrics.nfe)
        self._tokens_per_forward.observe(tokens / output.metrics.nfe)
        self._first_block.observe(output.metrics.first_block_seconds)
        self._whole.observe(output.metrics.total_seconds)
