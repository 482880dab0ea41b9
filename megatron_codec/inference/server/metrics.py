"""What Prometheus reads at /metrics. Every name begins with `megatron_codec_`."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from megatron_codec.inference.loop import EngineLoop

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)


class EngineCollector(Collector):
    """The engine's own counts, read when Prometheus asks."""

    def __init__(self, loop: EngineLoop):
        self.loop = loop

    def collect(self) -> Iterator[Metric]:
        """One metric after the other."""
        now = self.loop.statistics()
        gauges = {
            "requests_waiting": ("Prompts that wait for room in the cache", now.waiting),
            "requests_running": ("Prompts that are being continued", now.running),
            "cache_used_tokens": ("Tokens in the key-value cache", now.cache_used),
            "cache_total_tokens": ("Room of the key-value cache in tokens", now.cache_total),
            "engine_healthy": ("1 while the engine goes on", float(self.loop.healthy)),
        }
        counters = {
            "prompt_tokens": ("Prompt tokens taken in", now.prompt_tokens),
            "cached_prompt_tokens": ("Of these, tokens whose keys were there already", now.cached_tokens),
            "generated_tokens": ("Tokens sampled", now.generated_tokens),
            "constrained_tokens": ("Tokens sampled under the grammar", now.constrained_tokens),
            "redrawn_tokens": ("Of these, put in place of others by the grammar", now.redrawn),
            "removed_probability": ("What the grammar took away from each of these, summed", now.removed),
            "engine_steps": ("Forward passes", now.steps),
            "engine_step_seconds": ("Time in forward passes", now.step_seconds),
        }
        for name, (help_text, value) in gauges.items():
            yield GaugeMetricFamily(f"megatron_codec_{name}", help_text, value)
        for name, (help_text, value) in counters.items():
            yield CounterMetricFamily(f"megatron_codec_{name}", help_text, value)


class Metrics:
    """Counts of one server; any thread may count."""

    def __init__(self, loop: EngineLoop):
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(loop))
        ProcessCollector(registry=self.registry)

        def made(kind, name, text, labels=(), **options):
            return kind(f"megatron_codec_{name}", text, labels, registry=self.registry, **options)

        self._requests = made(Counter, "http_requests", "HTTP requests", ("route", "status"))
        self._request_seconds = made(
            Histogram, "http_request_seconds", "From head to end of the answer", ("route",), buckets=_SECONDS
        )
        self._first = made(Histogram, "time_to_first_token_seconds", "From submission", buckets=_SECONDS)
        self._token = made(
            Histogram, "time_per_token_seconds", "Mean between the tokens of a sample", buckets=_TOKEN_SECONDS
        )
        self._samples = made(Counter, "samples", "Samples that ended", ("reason",))
        self._pictures = made(
            Counter, "pictures", "Pictures that ended, by whether they are valid", ("valid",)
        )
        self._untouched = made(
            Counter,
            "pictures_valid_without_grammar",
            "Of the valid ones, those in which the grammar put no token in place of another",
        )

    def request(self, route: str, status: int, seconds: float) -> None:
        """An HTTP request was answered."""
        self._requests.labels(route, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def first_token(self, seconds: float) -> None:
        """The first token of a sample came, so long after it was asked for."""
        self._first.observe(seconds)

    def sample_ended(self, reason: str, tokens: int, seconds: float) -> None:
        """A sample ended, so long after its first token."""
        self._samples.labels(reason).inc()
        if tokens > 1:
            self._token.observe(seconds / (tokens - 1))

    def picture(self, valid: bool, redrawn: int) -> None:
        """A picture ended, with so many tokens that the grammar put in place of others."""
        if valid and not redrawn:
            self._untouched.inc()
        self._pictures.labels("yes" if valid else "no").inc()

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
