"""Reports of simulations: figures from the record alone, a table, plots, and one page that needs nothing else."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from sim_records import made_up_record

from cluster.sim.record import RequestRecord, RunRecord
from cluster.sim.report import plots
from cluster.sim.report.page import page
from cluster.sim.report.series import MAX_BANDS, MAX_BINS, make_series
from cluster.sim.report.summary import percentile, summarize
from cluster.sim.report.table import summary_table


def test_figures_are_those_of_the_requests() -> None:
    def request(name: str, first: float, last: float, tokens: int, outcome: str = "ok") -> RequestRecord:
        return RequestRecord(name, 1.0, 100, 25, tokens, first, last, 0.5, 0.1, "p", "d", outcome, 2.0, 0.1)

    record = RunRecord({}, 0, duration_s=10.0)
    record.requests = [
        request("good", 2.0, 3.0, 11),  # TTFT 1, TPOT 0.1
        request("late", 4.0, 5.0, 11),  # TTFT 3
        request("slow", 2.0, 4.0, 11),  # TPOT 0.2
        request("one token", 2.5, 2.5, 1),
        request("lost", 2.0, 3.0, 5, "QUEUE_FULL"),
    ]
    summary = summarize(record)
    assert (summary.num_requests, summary.num_ok, summary.num_good) == (5, 4, 2)
    assert (summary.goodput_per_s, summary.good_share) == (0.2, 0.4)
    assert summary.outcomes == {"ok": 4, "QUEUE_FULL": 1}
    assert (summary.ttft.p50, summary.ttft.p99) == (1.0, 3.0)
    assert summary.tpot.p50 == pytest.approx(0.1) and summary.tpot.p100 == pytest.approx(0.2)
    assert summary.queue_share_of_ttft == pytest.approx(4 * 0.5 / (1 + 3 + 1 + 1.5))
    assert summary.transfer_share == pytest.approx(4 * 0.1 / (2 + 4 + 3 + 1.5))
    assert summary.cached_share == 0.25
    assert summary.output_tokens_per_s == pytest.approx(3.9)
    assert summary.targets == ((2.0, 0.1),)


def test_percentiles_are_nearest_ranks() -> None:
    assert percentile([], 50) is None
    assert [percentile([1.0, 2.0, 3.0, 4.0], percent) for percent in (50, 75, 90, 100)] == [2.0, 3.0, 4.0, 4.0]


def test_the_table_names_workers_and_beyond_some_number_roles() -> None:
    few, many = (summary_table(summarize(made_up_record(count))) for count in (8, 40))
    assert "worker-7" in few and "12 QUEUE_FULL" in few and "role switches" in few
    assert "worker-7" not in many and re.search(r"prefill +20 ", many) and re.search(r"decode +25 ", many)


def test_an_empty_run_has_a_report(tmp_path: Path) -> None:
    record = RunRecord({}, 0)
    assert summarize(record).good_share == 0
    assert "requests" in summary_table(summarize(record))
    assert "<svg" in page(record)
    plots.write_plots(record, tmp_path / "empty.png")


@pytest.mark.parametrize("num_workers", [1, 65, 300])
def test_the_time_axis_keeps_every_request_and_every_worker(num_workers: int) -> None:
    record = made_up_record(num_workers, duration_s=1000.0, num_requests=500)
    series = make_series(record)
    assert series.num_bins == MAX_BINS
    width = series.edge_s[1]
    for rates, total in (
        (series.arrivals_per_s, len(record.requests)),
        (series.ended_per_s, len(record.requests)),
        (series.output_tokens_per_s, sum(request.output_tokens for request in record.requests)),
    ):
        assert sum(rate or 0.0 for rate in rates) * width == pytest.approx(total)
    assert sum(band.num_workers for band in series.bands) == num_workers and len(series.bands) <= MAX_BANDS
    alive = [sum(counts[index] or 0.0 for counts in series.role_counts.values()) for index in range(MAX_BINS)]
    assert alive[0] == num_workers and alive[-1] == num_workers - (num_workers > 3)
    third, half = MAX_BINS // 4, MAX_BINS // 2
    switching = len(range(0, num_workers, 8))
    before, during = (series.role_counts["prefill"][index] or 0 for index in (third, half))
    assert before - during == switching


class Links(HTMLParser):
    """Everything by which a page could load something, and whether tags are closed."""

    VOID = ("meta", "link", "img", "br", "input")

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.open: list[str] = []
        self.count: dict[str, int] = {}

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.urls += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href", "action")]
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("num_workers", [8, 200])
def test_the_page_is_whole_and_loads_nothing(num_workers: int) -> None:
    record = made_up_record(num_workers, num_requests=300)
    record.settings["trace"] = "</script><b>x & y"
    text = page(record, "A <run>")
    links = Links()
    links.feed(text)
    assert links.open == [] and links.urls == []
    assert not re.search(r"https?://|@import|url\(", text)
    assert "prefers-color-scheme: dark" in text and "A &lt;run&gt;" in text and "<b>x" not in text
    assert links.count["svg"] == 10 and 'class="solid prefill' in text and 'class="limit"' in text
    assert links.count["rect"] == min(num_workers, MAX_BANDS) or links.count["rect"] <= MAX_BANDS
    assert "NaN" not in text and "nan" not in re.findall(r'd="[^"]*"', text)
    data = json.loads(text.split('id="series">')[1].split("</script>")[0])
    assert all(len(found) == len(data["edges"]) for found in data["values"].values())
    assert len(text) < 400_000


def test_a_page_of_a_thousand_workers_stays_small() -> None:
    text = page(made_up_record(1000, num_requests=200, duration_s=60.0))
    assert len(text) < 400_000 and "1000 workers in 63 rows" in text


def test_plots_are_written_and_their_lack_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plots.png"
    plots.write_plots(made_up_record(4, 100, 30.0), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(plots.PlotsMissing, match=r"baton-serve\[plots\]"):
        plots.write_plots(made_up_record(4, 100, 30.0), path)
