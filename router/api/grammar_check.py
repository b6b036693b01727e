"""Reads the grammar of a request before anything of it runs, on a thread of its own, and says what is wrong with it and where.

Workers read it again with their vocabulary; what is refused here they would refuse after the prompt has been computed.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict

from router.api.formats import grammars
from router.api.structure import Wanted, subschemas
from router.api.translate import Job
from workers.errors import InvalidRequest, Refusal, Refused
from workers.grammar.language import MISSING, engine_name
from workers.grammar.vocabulary import GrammarVocabulary
from workers.machine.threads import started_threads
from workers.status import ModelInfo
from workers.text.tokenizer import Tokenizer

_MAX_KEPT = 1024
_MAX_WAITING = 64
_MAX_LOOKS = 64
"""Parts of a schema that are read by themselves to find the one that is wrong."""
_TIMEOUT_S = 10.0


class GrammarChecks:
    """Used by one event loop; keeps which grammars were found sound, by their digests."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Takes about 10 us a token of the vocabulary."""
        self._vocabulary: GrammarVocabulary | None = None
        if engine_name():
            self._vocabulary = GrammarVocabulary(tokenizer, tokenizer.vocab_size, sorted(tokenizer.eos_token_ids))
        self._sound: OrderedDict[bytes, None] = OrderedDict()
        self._pool = started_threads(1, "grammar-check")
        self._num_waiting = 0

    async def check(self, job: Job, wanted: Wanted, model: ModelInfo) -> None:
        """`wanted`: the job's. Raises InvalidRequest naming the place, or Refused when too many wait to be read."""
        grammar = job.requests[0].params.grammar
        if self._vocabulary is None or not model.grammars:
            raise InvalidRequest(f"{'the router' if model.grammars else 'the workers'}: {MISSING}", wanted.param)
        digest = hashlib.blake2b(grammar.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if digest in self._sound:
            self._sound.move_to_end(digest)
            return
        if self._num_waiting >= _MAX_WAITING:
            raise Refused(Refusal.QUEUE_FULL, "too many grammars wait to be read", retry_after_s=1.0)
        self._num_waiting += 1
        try:
            work = asyncio.get_running_loop().run_in_executor(self._pool, check_job, job, wanted, self._vocabulary)
            problem = await asyncio.wait_for(work, _TIMEOUT_S)
        except TimeoutError:
            problem = f"{wanted.param} was not read within {_TIMEOUT_S:g} s: make it smaller"
        finally:
            self._num_waiting -= 1
        if problem:
            raise InvalidRequest(problem, wanted.param)
        self._sound[digest] = None
        if len(self._sound) > _MAX_KEPT:
            self._sound.popitem(last=False)


def check_job(job: Job, wanted: Wanted, vocabulary: GrammarVocabulary) -> str:
    """What is wrong with the grammar of a job that has one, and where; empty: nothing."""
    grammar = job.requests[0].params.grammar
    try:
        grammar.encode()
    except UnicodeEncodeError:
        return f"{wanted.param} holds half a character (a lone surrogate)"
    problem = vocabulary.problem_of(grammar)
    if problem and wanted.schema is not None:
        problem = f"at {_place(wanted.schema, vocabulary)}: {problem.split('failed to compile JSON schema: ')[-1]}"
    return f"{wanted.param} cannot be followed: {problem}" if problem else ""


def _place(schema: object, vocabulary: GrammarVocabulary) -> str:
    """The innermost part of a schema that cannot be read by itself."""
    where, looks = "$", 0
    root = schema if isinstance(schema, dict) else {}
    shared = {key: root[key] for key in ("$defs", "definitions") if key in root}
    while True:
        for place, part in subschemas(schema, where):
            looks += 1
            if looks > _MAX_LOOKS:
                return where
            alone = (
                {**(shared if isinstance(part, dict) and "$ref" in str(part) else {}), **part}
                if isinstance(part, dict)
                else part
            )
            if vocabulary.problem_of(grammars.whole(grammars.json_rule(alone))):
                where, schema = place, part
                break
        else:
            return where
