"""`baton simulate` says in one sentence what it cannot read, and what it simulated when it can."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.sim.faults import fault_of, random_faults, read_faults
from cluster.sim.traces.files import read_trace, scaled
from cluster.sim.traces.generated import Recipe, generate, recipe_of
from workers.errors import InvalidConfig

MOONCAKE = {"timestamp": 1500, "input_length": 600, "output_length": 5, "hash_ids": [7, 8]}
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:15:46.6805900,374,44\r\n"


def written(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines))
    return str(path)


@pytest.mark.parametrize(
    ("name", "lines", "complaint"),
    [
        ("t.jsonl", [json.dumps(MOONCAKE), "{"], "t.jsonl:2: this line is no JSON"),
        ("t.jsonl", ["[]"], "t.jsonl:1: this line is no JSON object"),
        ("t.jsonl", [json.dumps({**MOONCAKE, "input_length": "x"})], "t.jsonl:1: input_length must be"),
        ("t.jsonl", [json.dumps({**MOONCAKE, "output_length": 0})], "t.jsonl:1: output_length must be"),
        ("t.jsonl", [json.dumps({**MOONCAKE, "hash_ids": [1]})], "t.jsonl:1: 1 hash_ids do not make a prompt of 600"),
        ("t.jsonl", [json.dumps({**MOONCAKE, "timestamp": -1})], "t.jsonl:1: timestamp must be"),
        ("t.jsonl", [""], "has no requests"),
        ("t.csv", [AZURE + "2023-11-16 18:15:50.99,abc,1"], "t.csv:3: ContextTokens must be"),
        ("t.csv", [AZURE + "yesterday,1,1"], "t.csv:3: TIMESTAMP 'yesterday' is no time"),
        ("t.csv", ["a,b"], "t.csv:1: the columns must be"),
        ("t.txt", ["a"], "a trace ends in .jsonl"),
    ],
)
def test_a_broken_trace_is_named_by_file_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, lines: list[str], complaint: str
) -> None:
    assert main(["simulate", "--trace", written(tmp_path / name, *lines)]) == 2
    error = capsys.readouterr().err.strip()
    assert complaint in error and "\n" not in error


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--split", "4:0"], "no worker could decode"),
        (["--split", "0:4"], "no worker could prefill"),
        (["--split", "four"], "--split takes PREFILL:DECODE"),
        (["--split", "1:1", "--workers", "3"], "makes 2 workers, and --workers says 3"),
        (["--slo", "ttft=fast"], "--slo takes seconds"),
        (["--slo", "tpot=0.000001"], "no worker can meet tpot=1e-06"),
        (["--profile", "abacus:21B-A3B"], "abacus"),
        (["--policy", "astrology"], "policy"),
        (["--set", "router.colour=red"], "colour"),
        (["--trace", "generated:cats=3"], "'cats' is none of these"),
        (["--trace", "generated:rate=-1"], "rate of a generated trace must be at least"),
        (["--trace", "nowhere.jsonl"], "cannot read the trace nowhere.jsonl"),
    ],
)
def test_what_cannot_be_simulated_gets_one_sentence(
    capsys: pytest.CaptureFixture[str], flags: list[str], complaint: str
) -> None:
    assert main(["simulate", *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert complaint in error and "\n" not in error


def test_a_trace_is_simulated_and_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**MOONCAKE, "timestamp": at * 100} for at in range(20)]
    trace = written(tmp_path / "t.jsonl", *map(json.dumps, rows))
    faults = written(tmp_path / "faults", "# what goes wrong", "0.5 kill decode-0 restart=1")
    told, page = tmp_path / "told.json", tmp_path / "page.html"
    flags = ["--split", "1:2", "--faults", faults, "--slo", "ttft=30,tpot=1", "--copies", "2"]
    assert main(["simulate", "--trace", trace, *flags, "--json", str(told), "--html", str(page)]) == 0
    assert "goodput" in capsys.readouterr().out
    summary = json.loads(told.read_text())
    assert (summary["num_requests"], summary["num_good"], summary["num_faults"]) == (40, 40, 1)
    assert page.read_text().startswith("<!")


def test_traces_keep_their_prefixes(tmp_path: Path) -> None:
    rows = [MOONCAKE, {**MOONCAKE, "timestamp": 2500, "hash_ids": [7, 9]}]
    first, second = read_trace(Path(written(tmp_path / "t.jsonl", *map(json.dumps, rows))))
    assert (first.at_s, second.at_s, len(second.prompt())) == (0.0, 1.0, 600)
    assert first.prompt()[:512] == second.prompt()[:512] and first.prompt()[512:] != second.prompt()[512:]
    stranger = list(scaled([first], 2, 2.0))[1]
    assert stranger.prompt()[:3] != first.prompt()[:3]
    (lone,) = read_trace(Path(written(tmp_path / "t.csv", AZURE)))
    assert (lone.prompt_tokens, lone.output_tokens, len(lone.prompt())) == (374, 44, 374)


def test_a_generated_trace_is_as_its_recipe_says() -> None:
    recipe = recipe_of("generated:requests=2000,rate=5,prompt=1000,output=200,hangups=0.1")
    trace = list(generate(recipe, 1, 32768))
    assert trace == list(generate(recipe, 1, 32768)) and len(trace) == 2000
    assert trace == sorted(trace, key=lambda request: request.at_s)
    assert 180 < sum(request.output_tokens for request in trace) / 2000 < 220
    assert 150 < sum(request.hangs_up_after is not None for request in trace) < 250
    shifting = list(generate(Recipe(requests=900, turns=1.0, shift=1), 1, 32768))
    first, middle = shifting[:300], shifting[300:600]
    assert sum(r.prompt_tokens for r in first) > 4 * sum(r.prompt_tokens for r in middle)
    assert sum(r.output_tokens for r in first) * 4 < sum(r.output_tokens for r in middle)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("1 explode decode-0", "'explode' is no kind of fault"),
        ("1 kill", "kill needs a target"),
        ("x kill decode-0", "the time must be a number"),
        ("1 kill decode-0 for=2", "kill does not take for"),
        ("1 switch decode-0 role=king", "switch needs role="),
    ],
)
def test_a_broken_fault_is_named_by_its_line(tmp_path: Path, text: str, complaint: str) -> None:
    path = written(tmp_path / "faults", "0 drain decode-0", text)
    with pytest.raises(InvalidConfig, match="faults:2: ") as caught:
        read_faults(Path(path))
    assert complaint in str(caught.value)


def test_faults_read_back_as_they_are_written() -> None:
    drawn = random_faults(random.Random(3), ["decode-0", "prefill-0"], ["router-0"], 30.0, 200)
    assert {fault.kind for fault in drawn} == {
        "kill",
        "hang",
        "slow",
        "cut",
        "late",
        "lose",
        "store",
        "switch",
        "drain",
        "undrain",
    }
    for fault in drawn:
        read = fault_of(str(fault).split())
        assert str(read) == str(fault) and (read.kind, read.targets, read.role) == (
            fault.kind,
            fault.targets,
            fault.role,
        )
