"""The numbers of this router under the names that vLLM has for them, for autoscalers and gateways that read those."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client.core import GaugeMetricFamily, Metric

from router.backend import RouterStatus

_NAMES = {
    "baton_time_to_first_token_seconds": ("vllm:time_to_first_token_seconds",),
    "baton_inter_token_latency_seconds": ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"),
    "baton_e2e_request_latency_seconds": ("vllm:e2e_request_latency_seconds",),
    "baton_decode_queue_seconds": ("vllm:request_queue_time_seconds",),
    "baton_prompt_tokens": ("vllm:prompt_tokens", "vllm:prefix_cache_queries"),
    "baton_cached_prompt_tokens": ("vllm:prefix_cache_hits",),
    "baton_generation_tokens": ("vllm:generation_tokens",),
    "baton_choices_finished": ("vllm:request_success",),
}
"""Ours, and vLLM's; counters without their ending."""
_LABELS = {"reason": "finished_reason"}


def vllm_metrics(own: Iterable[Metric], status: RouterStatus, model: str) -> Iterator[Metric]:
    """Each with vLLM's labels: `model_name`, and `engine`, which is 0, as a router is one engine to its clients."""
    labels = {"model_name": model, "engine": "0"}
    for metric in own:
        for name in _NAMES.get(metric.name, ()):
            renamed = Metric(name, metric.documentation, metric.type)
            for sample in metric.samples:
                said = {_LABELS.get(label, label): value for label, value in sample.labels.items()}
                suffix = sample.name.removeprefix(metric.name)
                renamed.add_sample(name + suffix, labels | said, sample.value, exemplar=sample.exemplar)
            yield renamed
    loads = [view.status.load for view in status.workers if view.connected]
    blocks, free = sum(load.num_blocks for load in loads), sum(load.num_free_blocks for load in loads)
    preempted = sum(value for view in status.workers for name, value in view.status.counters if name == "preemptions")
    gauges = {
        "vllm:num_requests_running": ("Requests that run on workers", float(status.num_running)),
        "vllm:num_requests_waiting": ("Requests that wait for a worker", float(status.num_waiting)),
        "vllm:kv_cache_usage_perc": (
            "Share of the workers' KV blocks that is in use; 1: all",
            1 - free / blocks if blocks else 0.0,
        ),
    }
    for name, (documentation, value) in gauges.items():
        gauge = GaugeMetricFamily(name, documentation, labels=tuple(labels))
        gauge.add_metric(tuple(labels.values()), value)
        yield gauge
    preemptions = Metric("vllm:num_preemptions", "Sequences that gave their blocks to others", "counter")
    preemptions.add_sample("vllm:num_preemptions_total", labels, preempted)
    yield preemptions
