"""What an operator asks of a running cluster: is it well, what happened to a request, and everything in one archive."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from browser import browser, program
from cluster_process import MODEL, ClusterProcess

pytestmark = pytest.mark.timeout(400)


def test_the_doctor_finds_a_cluster_well_its_ray_as_well_and_a_completion_answered(cluster: ClusterProcess) -> None:
    done = cluster.baton("doctor", "--url", cluster.url, "--ask", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {(each["subject"], each["text"]) for each in json.loads(done.stdout)}
    assert ("Ray", f"its head listens at {cluster.ray_address}") in found
    assert {"versions", "kernels", "/dev/shm", "router", "fingerprints", "request", "stream"} <= {
        name for name, _ in found
    }


def test_a_bundle_holds_the_logs_of_each_worker_by_its_name_and_stacks(cluster: ClusterProcess, tmp_path: Path) -> None:
    path = tmp_path / "bundle.tar.gz"
    done = cluster.baton("debug", "bundle", "--url", cluster.url, "--out", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    with tarfile.open(path) as archive:
        parts = {name.partition("/")[2]: archive.extractfile(name).read().decode() for name in archive.getnames()}  # type: ignore[union-attr]
    logs = "".join(text for name, text in parts.items() if name.startswith("logs/worker-"))
    assert all(f" INFO    {name} {name} serves " in logs for name in cluster.workers()), sorted(parts)
    assert any("ray::" in text for name, text in parts.items() if name.startswith("stacks/")), sorted(parts)
    assert json.loads(parts["roles.json"])["workers"]


def test_the_way_of_a_request_is_found_by_the_id_of_its_answer(cluster: ClusterProcess) -> None:
    answer = cluster.post("/v1/completions", {"model": MODEL.name, "prompt": "a way " * 40, "max_tokens": 4})
    (way,) = cluster.get(f"/admin/requests/{answer['id']}")["requests"]
    assert [step["what"] for step in way["steps"]] == ["sent", "first output", "ended"]
    assert way["decode_worker"] in cluster.workers() and way["num_tokens"] == answer["usage"]["completion_tokens"]


@pytest.mark.skipif(program is None, reason="there is no Chromium")
def test_the_page_of_a_running_cluster_shows_its_workers_and_a_switch_as_it_happens(
    cluster: ClusterProcess, tmp_path: Path
) -> None:
    """BATON_PICTURES keeps the picture."""
    answer = cluster.post("/v1/completions", {"model": MODEL.name, "prompt": "a picture " * 40, "max_tokens": 4})
    names = set(cluster.workers())
    with browser(tmp_path / "browser") as page:
        page.open(f"{cluster.url}/admin/ui#request={answer['id']}")
        page.wait_for("typeof at === 'function'")
        page.wait_for(f"at('workers').rows.length === {len(names)} && at('way').rows.length")
        page.wait_for(f"at('lanes').rows.length === {len(names)}")
        text = page.text()
        assert all(f"{name} {name.partition('-')[0]} serves" in text for name in names), text
        assert "first output" in page.ask("at('way').innerText") and f"{len(names)} workers" in text, text
        cluster.post("/admin/workers/decode-1/role", {"role": "mixed"})
        try:
            page.wait_for("at('events').innerText.includes('decode-1 switched from decode to mixed')")
            page.picture(tmp_path / "cluster.png")
        finally:
            cluster.post("/admin/workers/decode-1/role", {"role": "decode"})
        page.wait_for("at('events').innerText.includes('decode-1 switched from mixed to decode')")
