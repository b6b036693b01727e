"""A simulation's record can be written, read again and thinned without losing what it says."""

from __future__ import annotations

import pytest

from cluster.sim import record as records
from cluster.sim.record import FaultRecord, RequestRecord, RouterSample, RunRecord, Switch, WorkerSample


def _request(**changes: object) -> RequestRecord:
    values: dict[str, object] = {
        "name": "r1", "arrival_s": 1.0, "prompt_tokens": 100, "cached_tokens": 64, "output_tokens": 11,
        "first_token_s": 1.5, "finished_s": 2.5, "queue_s": 0.1, "transfer_s": 0.02, "prefill_worker": "prefill-0",
        "decode_worker": "decode-0", "outcome": "ok", "ttft_target_s": 1.0, "tpot_target_s": 0.1,
    }  # fmt: skip
    return RequestRecord(**{**values, **changes})  # type: ignore[arg-type]


def test_a_record_reads_back_as_it_was_written() -> None:
    run = RunRecord({"workers": 2}, 7, duration_s=3.0, num_events=12, counters={"preemptions": 1.0})
    run.requests.append(_request())
    run.samples.append(WorkerSample(1.0, "decode-0", "decode", 3, 1, 0.5, 0.9))
    run.router_samples.append(RouterSample(1.0, 2, 4))
    run.switches.append(Switch(1.0, "decode-0", "prefill", 9))
    run.faults.append(FaultRecord(2.0, "kill", "decode-0", "2 kill decode-0"))
    assert RunRecord.of_lines(run.lines()) == run


@pytest.mark.parametrize("lines", [[], ['{"entry": "request"}'], ["no json"], ['{"entry": "run", "color": 1}']])
def test_what_is_no_record_is_refused(lines: list[str]) -> None:
    with pytest.raises(ValueError):
        RunRecord.of_lines(lines)


def test_a_request_is_good_only_within_its_targets() -> None:
    assert _request().is_good
    assert not _request(first_token_s=2.01).is_good
    assert not _request(finished_s=2.51).is_good
    assert not _request(outcome="worker_lost").is_good
    assert _request(ttft_target_s=None, tpot_target_s=None, first_token_s=900.0, finished_s=999.0).is_good
    assert _request(output_tokens=1, finished_s=1.5).tpot_s is None


def test_samples_are_thinned_by_moments_at_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_SAMPLES", 8)
    run = RunRecord({}, 0)
    run.samples = [WorkerSample(at, name, "decode", 0, 0, 0.0, 0.0) for at in (0.0, 1.0, 2.0, 3.0) for name in "ab"]
    run.thin()
    assert [(sample.at_s, sample.worker) for sample in run.samples] == [(0.0, "a"), (0.0, "b"), (2.0, "a"), (2.0, "b")]
    assert run.sample_interval_s == 2.0
