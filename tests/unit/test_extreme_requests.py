"""The extreme of every field of every body is known, and is answered or refused as the caller's fault."""

from __future__ import annotations

import json

from fake_backend import MODEL, open_api
from test_bench_serve import load

from router.config import ApiConfig

extremes = load("extreme_requests")

API = ApiConfig(max_body_bytes=1 << 20)
"""The cost of a body grows with its size alone."""
ANSWERS = {200, 400, 404, 413, 429}


def test_every_extreme_of_every_field_is_answered_or_refused() -> None:
    """A field that is new fails here: say in bench/extreme_requests.py what the most is that may be asked of it."""
    answers = []
    with open_api(API) as api:
        for case in extremes.cases(MODEL.vocab_size, MODEL.max_model_len, API):
            api.backend.reset()
            answer = api.http.post(case.path, content=json.dumps(case.body).encode())
            assert answer.status_code in ANSWERS, (case.path, case.name, answer.text[:300])
            assert "internal error" not in answer.text, (case.path, case.name)
            answers.append(answer.status_code)
    assert {200, 400} <= set(answers)
