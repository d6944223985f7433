"""What Prometheus reads at /metrics."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lumi.inference.scheduler import Scheduler
from lumi.server.schema import Usage

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counters and gauges of one server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.first_token = Histogram(
            "lumi_time_to_first_token_seconds",
            "From a request to the first token of an answer",
            buckets=_SECONDS,
            registry=registry,
        )
        self._seconds = Histogram(
            "lumi_request_seconds", "From a request to its end", buckets=_SECONDS, registry=registry
        )
        self._requests = Counter(
            "lumi_requests", "Requests for generation, by how they ended", ["outcome"], registry=registry
        )
        self._prompt = Counter("lumi_prompt_tokens", "Tokens of prompts", registry=registry)
        self._cached = Counter(
            "lumi_cached_prompt_tokens", "Tokens of prompts that were computed before", registry=registry
        )
        self._generated = Counter("lumi_generated_tokens", "Tokens of answers", registry=registry)
        self._running = Gauge("lumi_running", "Choices in the batch", registry=registry)
        self._waiting = Gauge("lumi_waiting", "Choices that wait for their turn", registry=registry)
        self._pages = Gauge("lumi_cache_pages", "Pages of the cache", registry=registry)
        self._held = Gauge("lumi_cache_pages_held", "Pages that running choices hold", registry=registry)

    def count(self, usage: Usage, seconds: float, finished: bool) -> None:
        """Count a request that has ended. Not finished: its client went away, or it failed."""
        self._requests.labels("finished" if finished else "ended early").inc()
        self._seconds.observe(seconds)
        self._prompt.inc(usage.prompt_tokens)
        self._cached.inc(usage.prompt_tokens_details.cached_tokens)
        self._generated.inc(usage.completion_tokens)

    def page(self, scheduler: Scheduler) -> bytes:
        """The text for Prometheus."""
        self._running.set(len(scheduler.running))
        self._waiting.set(len(scheduler.waiting))
        self._pages.set(scheduler.pages.count)
        self._held.set(scheduler.pages.num_held)
        return generate_latest(self.registry)
