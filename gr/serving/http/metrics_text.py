"""The counters of an engine and its server, in the text format of Prometheus."""

from collections.abc import Iterator, Mapping
from itertools import accumulate

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from gr.serving.engine import Engine
from gr.serving.metrics import Histogram
from gr.serving.verbs.kv_cache import KVCache
from gr.serving.verbs.ranking import RankServable

CONTENT_TYPE = CONTENT_TYPE_LATEST
_HISTOGRAMS = {
    "request_seconds": "From the arrival of a request to its answer.",
    "batch_seconds": "Of one batch in the model.",
    "batch_requests": "Requests of one batch.",
    "batch_rows": "Rows of one batch.",
}


def metrics_text(engine: Engine, responses: Mapping[int, int], bodies: int) -> bytes:
    """responses: HTTP answers by status. bodies: bytes that are held."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(engine, responses, bodies))
    ProcessCollector(registry=registry)
    return generate_latest(registry)


class _Collector:
    """Reads the counts when they are asked for: there is no second copy of them."""

    def __init__(self, engine: Engine, responses: Mapping[int, int], bodies: int) -> None:
        self._engine, self._responses, self._bodies = engine, responses, bodies

    def collect(self) -> Iterator[Metric]:
        metrics, version = self._engine.metrics, self._engine.version
        info = GaugeMetricFamily("gr_version_info", "The version that new requests get.", labels=["version", "kind"])
        info.add_metric([version.name, version.kind], 1)
        yield info
        yield CounterMetricFamily("gr_swaps", "Versions that took the place of another.", value=metrics.swaps)
        failures = "Versions that could not be opened, so that the one before is still served."
        yield CounterMetricFamily("gr_swap_failures", failures, value=metrics.swap_failures)
        unknown = CounterMetricFamily("gr_unknown_values", "Values that training did not see.", labels=["input"])
        for column, count in sorted(version.count_unknown.by_column().items()):
            unknown.add_metric([column], count)
        yield unknown
        for servable in version.verbs.values():
            if isinstance(servable, RankServable) and servable.cache is not None:
                yield from _of_cache(servable.cache)
        requests = CounterMetricFamily("gr_requests", "Requests, by what became of them.", labels=["verb", "outcome"])
        waiting = GaugeMetricFamily("gr_waiting_rows", "Rows that wait for a batch.", labels=["verb"])
        for verb, counts in metrics.verbs.items():
            for outcome, count in sorted(counts.outcomes.items()):
                requests.add_metric([verb, outcome], count)
            waiting.add_metric([verb], self._engine.waiting()[verb])
        yield requests
        yield waiting
        for name, description in _HISTOGRAMS.items():
            family = HistogramMetricFamily(f"gr_{name}", description, labels=["verb"])
            for verb, counts in metrics.verbs.items():
                histogram: Histogram = getattr(counts, name)
                bounds = [*map(str, histogram.bounds), "+Inf"]
                family.add_metric([verb], list(zip(bounds, accumulate(histogram.counts), strict=True)), histogram.sum)
            yield family
        answers = CounterMetricFamily("gr_http_responses", "HTTP answers, by status.", labels=["status"])
        for status, count in sorted(self._responses.items()):
            answers.add_metric([str(status)], count)
        yield answers
        yield GaugeMetricFamily("gr_http_body_bytes", "Bodies that are being read or answered.", value=self._bodies)


def _of_cache(cache: KVCache) -> Iterator[Metric]:
    """The counters of this version's cache: a version swapped in begins with none of another's keys and values."""
    outcomes = CounterMetricFamily(
        "gr_kv_cache", "Requests by what was cached, and entries that left.", labels=["outcome"]
    )
    for outcome, count in sorted(cache.counts.items()):
        outcomes.add_metric([outcome], count)
    yield outcomes
    yield GaugeMetricFamily("gr_kv_cache_users", "Users with cached keys and values.", value=len(cache))
    yield GaugeMetricFamily("gr_kv_cache_bytes", "Of cached keys and values.", value=cache.bytes)
