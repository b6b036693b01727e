"""Files of requests answered offline by the shipped model, as the HTTP API would; and a run that goes on where one was interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.batch import answered, read_lines, run_batch
from cluster.cli import main
from workers.config import WorkerConfig
from workers.errors import InvalidConfig

MODEL = Path(__file__).resolve().parents[2] / "models" / "ernie-4.5-tiny"
WHO = {"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 30, "temperature": 0}


def line(custom_id: str, body: dict[str, Any], url: str = "/v1/chat/completions") -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body}) + "\n"


def entries(path: Path) -> dict[str, Any]:
    found = [json.loads(text) for text in path.read_text().splitlines()]
    assert len({entry["custom_id"] for entry in found}) == len(found)
    return {entry["custom_id"]: entry["response"] for entry in found}


def test_a_file_is_answered_and_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        line("who", WHO)
        + line("regex", {"prompt": "x", "max_tokens": 20, "regex": "[ab]{3}", "seed": 1}, "/v1/completions")
        + line("wrong", {**WHO, "temperature": 9})
        + "\n"
        + line("responses", {"input": "Who are you?", "max_output_tokens": 30, "temperature": 0}, "/v1/responses")
        + "".join(line(f"more-{n}", {**WHO, "max_tokens": 2}) for n in range(20))
    )
    config = WorkerConfig(model=str(MODEL), kv_memory_bytes=64_000_000, max_num_seqs=4)
    assert run_batch(config, source, target, progress=False) == (24, 1)
    answers = entries(target)
    assert "Baton" in answers["who"]["body"]["choices"][0]["message"]["content"]
    assert answers["responses"]["body"]["status"] == "completed"
    assert len(answers["regex"]["body"]["choices"][0]["text"]) == 3
    assert answers["wrong"]["status_code"] == 400 and "temperature" in answers["wrong"]["body"]["error"]["message"]

    whole = target.read_text().splitlines(keepends=True)
    target.write_text("".join(whole[:5]) + whole[5][:20])
    assert len(answered(target)) == 5
    assert run_batch(config, source, target, progress=False)[0] == 19
    assert set(entries(target)) == set(answers)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1 is not JSON"),
        ('{"custom_id": "a"}\n', "line 1 must have custom_id"),
        (line("a", {}, "/v1/embeddings"), "url must be one of"),
        (line("a", {"stream": True}), "not streamed"),
        (line("a", {}) + line("a", {}), "line 2: the custom_id 'a' has been used before"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_before_anything_runs(
    tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(text)
    with pytest.raises(InvalidConfig, match=message):
        list(read_lines(source))
    assert main(["batch", "-i", str(source), "-o", str(tmp_path / "out.jsonl"), "--model", str(MODEL)]) == 2
    assert message in capsys.readouterr().err


def test_another_file_is_not_taken_for_an_output(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("notes\n")
    with pytest.raises(InvalidConfig, match="no output of a batch"):
        answered(tmp_path / "notes.txt")
