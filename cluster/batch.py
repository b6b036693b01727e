"""Answers a file of requests offline, as OpenAI's batch API does: one JSON object a line in, one a line out, in the order in which they end.

The requests run through the HTTP API's own code, in this process. A run that was interrupted goes on where its output file ends.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from cluster.local_backend import LocalBackend
from router.api.app import create_app
from router.config import ApiConfig
from workers.config import WorkerConfig
from workers.errors import InvalidConfig
from workers.model.loading import ServedModel
from workers.text.tokenizer import Tokenizer

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
MAX_LINE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class BatchLine:
    custom_id: str
    url: str
    body: dict[str, Any]


def read_lines(path: Path) -> Iterator[BatchLine]:
    """Raises InvalidConfig naming the first line that cannot be used."""
    seen: set[str] = set()
    with path.open("rb") as file:
        for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
            where = f"{path}, line {number}"
            if len(raw) > MAX_LINE_BYTES:
                raise InvalidConfig(f"{where} is longer than {MAX_LINE_BYTES >> 20} MiB")
            if not raw.strip():
                continue
            line = _read_line(raw, where)
            if line.custom_id in seen:
                raise InvalidConfig(f"{where}: the custom_id {line.custom_id!r:.80} has been used before")
            seen.add(line.custom_id)
            yield line


def _read_line(raw: bytes, where: str) -> BatchLine:
    try:
        entry = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InvalidConfig(f"{where} is not JSON: {error}") from error
    match entry:
        case {"custom_id": str(custom_id), "url": str(url), "body": dict(body)} if (
            entry.get("method", "POST") == "POST"
        ):
            pass
        case _:
            raise InvalidConfig(f"{where} must have custom_id, method POST, url and body")
    if url not in URLS:
        raise InvalidConfig(f"{where}: url must be one of {', '.join(URLS)}, not {url!r:.80}")
    if body.get("stream"):
        raise InvalidConfig(f"{where}: answers in a file are not streamed")
    return BatchLine(custom_id, url, body)


def answered(path: Path) -> set[str]:
    """The custom_ids that an output file has answers for; what an interrupted run left half written is cut off."""
    if not path.exists():
        return set()
    done: set[str] = set()
    kept = 0
    with path.open("rb+") as file:
        for raw in iter(file.readline, b""):
            if not raw.endswith(b"\n"):
                break
            kept += len(raw)
            try:
                entry = json.loads(raw)
                if not isinstance(entry["response"], dict):
                    raise TypeError("no answer")
                done.add(entry["custom_id"])
            except (ValueError, KeyError, TypeError) as error:
                raise InvalidConfig(f"{path} is no output of a batch: delete it, or name another file") from error
        file.truncate(kept)
    return done


def run_batch(config: WorkerConfig, source: Path, target: Path, progress: bool = True) -> tuple[int, int]:
    """Answers every line that has no answer yet; returns how many were answered now, and how many of these are errors."""
    if not source.is_file():
        raise InvalidConfig(f"{source} is no file")
    num_lines = sum(1 for _ in read_lines(source))  # all of them are looked at before the first one runs
    done = answered(target)
    backend = LocalBackend(config, ServedModel.load(config))
    return asyncio.run(_answer_all(backend, config, source, target, done, num_lines, progress))


async def _answer_all(
    backend: LocalBackend,
    config: WorkerConfig,
    source: Path,
    target: Path,
    done: set[str],
    num_lines: int,
    progress: bool,
) -> tuple[int, int]:
    backend.start()
    app = create_app(backend, Tokenizer.load(config.model), ApiConfig(insecure=True))
    transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
    num_at_once = 2 * config.max_num_seqs
    waiting: set[asyncio.Task[tuple[BatchLine, httpx.Response]]] = set()
    num_answered = num_errors = 0
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=None) as client:
            with (
                target.open("a", encoding="utf-8") as out,
                tqdm(total=num_lines, initial=len(done), disable=not progress, unit="req", dynamic_ncols=True) as bar,
            ):
                lines = (line for line in read_lines(source) if line.custom_id not in done)
                for line in lines:
                    waiting.add(asyncio.create_task(_ask(client, line)))
                    if len(waiting) < num_at_once:
                        continue
                    waiting, ended = await _take(waiting, out, bar)
                    num_answered, num_errors = num_answered + ended[0], num_errors + ended[1]
                while waiting:
                    waiting, ended = await _take(waiting, out, bar)
                    num_answered, num_errors = num_answered + ended[0], num_errors + ended[1]
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await backend.stop()
    return num_answered, num_errors


async def _ask(client: httpx.AsyncClient, line: BatchLine) -> tuple[BatchLine, httpx.Response]:
    return line, await client.post(line.url, json=line.body)


async def _take(waiting: set[Any], out: Any, bar: Any) -> tuple[set[Any], tuple[int, int]]:
    """Writes what has ended, at least one; returns what has not, and how many ended and failed."""
    ended, rest = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    num_errors = 0
    for task in ended:
        line, response = task.result()
        request_id = response.headers.get("x-request-id", "")
        answer = {"status_code": response.status_code, "request_id": request_id, "body": response.json()}
        is_error = response.status_code != 200
        num_errors += is_error
        error = {"code": str(response.status_code), "message": "see response.body"} if is_error else None
        entry = {"id": f"batch_req_{request_id}", "custom_id": line.custom_id, "response": answer, "error": error}
        out.write(json.dumps(entry, ensure_ascii=False) + "\n")
        bar.update()
    out.flush()
    return rest, (len(ended), num_errors)
