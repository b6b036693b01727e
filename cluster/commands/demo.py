"""`baton demo`: starts a cluster, asks one question per skill of its model, shows who computed what, and stops it."""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.commands.flags import add_cluster_flags, config_from
from cluster.console.output import StepPrinter, duration, size, table
from workers.errors import BatonError, InvalidConfig

if TYPE_CHECKING:
    from cluster.config import ClusterConfig


class DemoFailed(BatonError):
    """The cluster did not answer a question at all."""


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out example of one skill."""

    skill: str
    messages: tuple[dict[str, str], ...]
    expected: str
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Result:
    """An answer and what the cluster measured of it; None: not known or, for a handoff, there was none."""

    skill: str
    question: str
    expected: str
    answer: str
    right: bool
    prefill_worker: str | None
    decode_worker: str | None
    transport: str | None
    kv_bytes: int | None
    prompt_tokens: int
    completion_tokens: int
    ttft_s: float | None
    tpot_s: float | None


def read_questions(model: Path) -> tuple[Question, ...]:
    """The first example of each skill in <model>/skills.json. Raises InvalidConfig."""
    path = model / "skills.json"
    try:
        skills = json.loads(path.read_text(encoding="utf-8"))["skills"]
        questions = []
        for skill in skills:
            example = skill["examples"][0]
            messages = tuple({"role": str(m["role"]), "content": str(m["content"])} for m in example["messages"])
            questions.append(Question(skill["name"], messages, example["expected"], int(skill["max_tokens"])))
    except FileNotFoundError as error:
        raise InvalidConfig(f"the model folder {str(model)!r} has no skills.json to take questions from") from error
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise InvalidConfig(f"cannot read {str(path)!r}: {type(error).__name__}: {error}") from error
    if not questions:
        raise InvalidConfig(f"{str(path)!r} names no skill")
    return tuple(questions)


def is_right(skill: str, answer: str, expected: str) -> bool:
    """Equal text or, for the skill "json", equal values."""
    if skill == "json":
        try:
            return bool(json.loads(answer) == json.loads(expected))
        except ValueError:
            return False
    return answer.strip() == expected.strip()


def ask(url: str, api_key: str, questions: Sequence[Question]) -> tuple[Result, ...]:
    """Asks one question after the other, greedily and streamed, through the openai client. Raises DemoFailed."""
    try:
        import openai
    except ImportError as error:
        raise InvalidConfig("the demo needs the openai client: pip install 'baton-serve[demo]'") from error
    with openai.OpenAI(
        base_url=f"{url}/v1",
        api_key=api_key or "none",
        max_retries=0,
        timeout=120.0,
        # A proxy for the internet must not be asked for this host.
        http_client=openai.DefaultHttpxClient(trust_env=False),
    ) as client:
        try:
            model = client.models.list().data[0].id
            return tuple(_ask(client, model, question) for question in questions)
        except openai.OpenAIError as error:
            raise DemoFailed(f"the cluster at {url} did not answer: {error}") from error


def _ask(client: Any, model: str, question: Question) -> Result:
    pieces: list[str] = []
    trace: dict[str, Any] = {}
    usage: Any = None
    stream = client.chat.completions.create(
        model=model,
        messages=list(question.messages),
        max_tokens=question.max_tokens,
        temperature=0.0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"trace": True},
    )
    for chunk in stream:
        pieces += [choice.delta.content for choice in chunk.choices if choice.delta.content]
        usage = chunk.usage or usage
        trace = getattr(chunk, "baton", None) or trace
    way = (trace.get("choices") or [{}])[0]
    answer = "".join(pieces)
    return Result(
        skill=question.skill,
        question=question.messages[-1]["content"],
        expected=question.expected,
        answer=answer.strip(),
        right=is_right(question.skill, answer, question.expected),
        prefill_worker=way.get("prefill_worker"),
        decode_worker=way.get("decode_worker"),
        transport=way.get("transport"),
        kv_bytes=way.get("kv_bytes"),
        prompt_tokens=usage.prompt_tokens if usage else 0,
        completion_tokens=usage.completion_tokens if usage else 0,
        ttft_s=trace.get("ttft_s"),
        tpot_s=trace.get("tpot_s"),
    )


def results_table(results: Sequence[Result]) -> str:
    """Each question with its answer, then a table of where and how fast it ran."""
    lines = []
    for result in results:
        lines += [
            f"{result.skill}",
            f"  question  {_shorten(result.question)}",
            f"  answer    {_shorten(result.answer)}",
            "  right" if result.right else f"  WRONG; expected {_shorten(result.expected)}",
            "",
        ]
    headings = ("SKILL", "", "PREFILL", "DECODE", "TRANSPORT", "KV", "PROMPT", "OUTPUT", "TTFT", "TPOT")
    rows = [
        (
            result.skill,
            "right" if result.right else "WRONG",
            result.prefill_worker or "-",
            result.decode_worker or "-",
            result.transport or "-",
            "-" if result.kv_bytes is None else size(result.kv_bytes),
            str(result.prompt_tokens),
            str(result.completion_tokens),
            "-" if result.ttft_s is None else duration(result.ttft_s),
            "-" if result.tpot_s is None else duration(result.tpot_s),
        )
        for result in results
    ]
    num_right = sum(result.right for result in results)
    return "\n".join([*lines, table(headings, rows), "", f"{num_right} of {len(results)} right"])


def results_json(results: Sequence[Result]) -> str:
    return json.dumps(
        {"results": [asdict(result) for result in results], "right": all(result.right for result in results)},
        indent=2,
        ensure_ascii=False,
    )


def _shorten(text: str, limit: int = 100) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "demo",
        help="start a cluster, ask it one question per skill, stop it",
        description="Starts a cluster on a free port, asks one held-out question per skill of the model, stops it. "
        "Exit code 1: an answer was wrong.",
    )
    parser.add_argument("--json", action="store_true", help="the results as JSON")
    parser.add_argument("--prefill", type=int, metavar="N", help="prefill workers; default: 1")
    parser.add_argument("--decode", type=int, metavar="N", help="decode workers; default: 1")
    parser.add_argument("--mixed", type=int, metavar="N", help="workers that do both; default: 0")
    parser.add_argument(
        "--dashboard", action=argparse.BooleanOptionalAction, default=None, help="the Ray dashboard; default: off"
    )
    add_cluster_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from cluster.commands.demo import read_questions
    from cluster.commands.running import run_until_stopped
    from cluster.preflight import check_model
    from cluster.ray_session.folders import make_folder

    # Its prompts are short: an idle decode worker would compute them itself, and there would be no handoff to show.
    config = config_from(args, router__port=0, ray__dashboard=False, router__max_local_prefill_tokens=0)
    check_model(config.worker.model)
    questions = read_questions(Path(config.worker.model))
    progress = StepPrinter()
    folder = "" if config.ray.address else make_folder()
    return run_until_stopped(_demo(config, questions, args.json, progress, folder), folder, progress)


async def _demo(
    config: ClusterConfig, questions: tuple[Question, ...], as_json: bool, progress: StepPrinter, folder: str
) -> int:
    from cluster.commands.demo import ask, results_json, results_table
    from cluster.lifecycle import launched

    api_key = secrets.token_urlsafe()  # of the configured keys only hashes are known
    api = replace(config.router.api, api_keys=(*config.router.api.api_keys, api_key))
    config = replace(config, router=replace(config.router, api=api))
    async with launched(config, progress, folder) as cluster:
        with progress.step(f"asking {len(questions)} questions"):
            results = await asyncio.to_thread(ask, cluster.url, api_key, questions)
    print(results_json(results) if as_json else results_table(results))
    return 0 if all(result.right for result in results) else 1
