"""Draws follow the parameters and nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from workers.request import SamplingParams
from workers.runner import SampleSpec
from workers.sampling.filters import drop_unlikely
from workers.sampling.logprobs import token_logprobs
from workers.sampling.sampler import Drawn, _adjusted, _draw, sample
from workers.token_logprobs import LOGPROB_FLOOR


def spec(
    position: int = 0,
    choice: int = 0,
    prompt: tuple[int, ...] = (),
    output: tuple[int, ...] = (),
    suppressed: tuple[int, ...] = (),
    forced: int | None = None,
    **params: Any,
) -> SampleSpec:
    merged = SamplingParams(**{"temperature": 0, "seed": 1, **params})
    return SampleSpec(merged, choice, position, prompt, output, suppressed, forced)


def one(logits: list[float], spec: SampleSpec) -> int:
    return sample(torch.tensor([logits], dtype=torch.float32), [spec])[0].token_id


def possible(logits: list[float], num_draws: int = 400, **params: Any) -> set[int]:
    """All tokens that come up in many draws."""
    rows = torch.tensor([logits]).repeat(num_draws, 1)
    drawn = sample(rows, [spec(position, temperature=1.0, **params) for position in range(num_draws)])
    return {d.token_id for d in drawn}


def test_greedy_takes_the_largest_logit_and_of_equals_the_lowest_id() -> None:
    assert one([0, 3, 1, 3], spec()) == 1
    assert one([0, 3, 1, 3], spec(temperature=1e-7)) == 1


def test_a_bias_a_ban_and_a_suppressed_token_change_the_choice() -> None:
    assert one([0, 3, 1], spec(logit_bias=((2, 5.0),))) == 2
    assert one([0, 3, 1], spec(bad_words=((1,),))) == 2
    assert one([0, 3, 1], spec(suppressed=(1, 2))) == 0
    assert one([0, 3, 1], spec(logit_bias=((1, 100.0),), suppressed=(1,))) == 2


def test_a_bad_word_loses_its_last_token_only_where_its_beginning_was_written() -> None:
    word = ((4, 5, 1),)
    assert one([0, 3, 1], spec(bad_words=word, output=(4, 5))) == 2
    assert one([0, 3, 1], spec(bad_words=word, prompt=(9, 4), output=(5,))) == 2
    assert one([0, 3, 1], spec(bad_words=word, prompt=(4, 5))) == 2
    assert one([0, 3, 1], spec(bad_words=word, output=(4, 6))) == 1
    assert one([0, 3, 1], spec(bad_words=word, output=(5,))) == 1
    assert one([0, 3, 1], spec(bad_words=((7, 8, 9, 4, 5, 0), *word), output=(4, 5))) == 2


def test_repetition_penalty_sees_prompt_and_output_and_pushes_either_sign_down() -> None:
    assert one([2.9, 3, 0], spec(repetition_penalty=1.1, prompt=(1,))) == 0
    assert one([2.9, 3, 0], spec(repetition_penalty=1.1, output=(1, 1, 1))) == 0
    assert one([-3.1, -3, -9], spec(repetition_penalty=1.1, output=(1,))) == 0
    assert one([2.9, 3, 0], spec(repetition_penalty=1.1, prompt=(0, 1))) == 1


def test_presence_counts_a_token_once_and_frequency_every_time_and_only_in_the_output() -> None:
    logits = [2.0, 3.0, 2.4]
    assert one(logits, spec(presence_penalty=0.5, output=(1, 1, 1))) == 1
    assert one(logits, spec(frequency_penalty=0.5, output=(1, 1))) == 2
    assert one(logits, spec(frequency_penalty=0.5, output=(1, 1, 2))) == 0
    assert one(logits, spec(presence_penalty=2.0, frequency_penalty=2.0, prompt=(1, 1))) == 1
    assert one(logits, spec(presence_penalty=-0.9, output=(0,))) == 1
    assert one(logits, spec(presence_penalty=-1.5, output=(0,))) == 0


def test_top_k_top_p_and_min_p_keep_the_tokens_they_should() -> None:
    logits = [math.log(p) for p in (0.4, 0.1, 0.3, 0.2)]
    assert possible(logits) == {0, 1, 2, 3}
    assert possible(logits, top_k=2) == {0, 2}
    assert possible(logits, top_k=99) == {0, 1, 2, 3}
    assert possible(logits, top_p=0.69) == {0, 2}
    assert possible(logits, top_p=0.75) == {0, 2, 3}
    assert possible(logits, top_p=1e-6) == {0}
    assert possible(logits, min_p=0.6) == {0, 2}
    # top_p looks at what top_k left: 0.4 of 0.7 is above one half
    assert possible(logits, top_k=2, top_p=0.5) == {0}


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9, 0.999, 0.9999999])
def test_a_nucleus_is_the_fewest_likeliest_tokens_that_add_up_to_p_however_many(p: float) -> None:
    logits = torch.randn(1, 6000, generator=torch.Generator().manual_seed(0))
    probabilities, order = torch.softmax(logits[0], -1).sort(descending=True)
    num_kept = min(int((probabilities.cumsum(-1) < p).sum()) + 1, 6000)
    filtered = logits.clone()
    drop_unlikely(filtered, [SamplingParams(top_p=p)])
    kept = filtered[0].isfinite()
    assert set(kept.nonzero().squeeze(1).tolist()) == set(order[:num_kept].tolist())
    assert torch.equal(filtered[0][kept], logits[0][kept])


def test_draws_follow_the_tempered_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    num_draws, temperature = 20000, 0.7
    specs = [spec(position, temperature=temperature) for position in range(num_draws)]
    drawn = torch.tensor([d.token_id for d in sample(logits.repeat(num_draws, 1), specs)])
    expected = torch.softmax(logits / temperature, -1) * num_draws
    statistic = ((drawn.bincount(minlength=5) - expected) ** 2 / expected).sum()
    assert statistic < 18.5  # chi-square with 4 degrees of freedom, p = 0.001


def test_a_draw_repeats_with_its_seed_and_changes_with_seed_choice_and_position() -> None:
    logits = torch.zeros(1, 5000)

    def draw(**fields: Any) -> int:
        return sample(logits, [spec(temperature=1.0, **fields)])[0].token_id

    assert draw(seed=3, choice=1, position=2) == draw(seed=3, choice=1, position=2)
    tokens = [draw(seed=3), draw(seed=4), draw(seed=-3), draw(seed=3, choice=1), draw(seed=3, position=1)]
    assert len(set(tokens)) == len(tokens)


def test_a_row_does_not_depend_on_the_other_rows() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(12, 3000, generator=generator) * 3
    variants: list[dict[str, Any]] = [
        {},
        {"temperature": 0.8, "top_p": 0.8, "logprobs": 3},
        {"temperature": 1.2, "top_k": 7},
        {"temperature": 1.0, "min_p": 0.1, "logprobs": 0},
        {"temperature": 1.0, "top_p": 0.99999, "repetition_penalty": 1.3},
        {"presence_penalty": 1.0, "logprobs": 2},
    ]
    specs = [spec(i, prompt=(1, 2), output=(3, 3), **variants[i % 6]) for i in range(12)]
    together = sample(logits, specs)
    assert together == [sample(logits[i : i + 1], [specs[i]])[0] for i in range(12)]
    assert together[::-1] == sample(logits.flip(0), specs[::-1])


def test_logits_are_left_as_they_were() -> None:
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(2))
    before = logits.clone()
    sample(logits, [spec(temperature=0.5, top_k=3, logit_bias=((1, 4.0),)), spec(repetition_penalty=2.0, prompt=(1,))])
    assert torch.equal(logits, before)


def test_a_forced_token_is_returned_as_it_is() -> None:
    assert sample(torch.zeros(1, 4), [spec(forced=3, temperature=1.0, logprobs=2)]) == [Drawn(3)]


def logprobs(logits: Tensor, **params: Any) -> Any:
    return sample(logits, [spec(**params)])[0].logprob


def test_logprobs_are_those_of_the_raw_logits_whatever_changes_the_draw() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    expected = torch.log_softmax(logits[0], -1).tolist()
    found = logprobs(logits, logprobs=2, temperature=0.5, top_k=1, bad_words=((1,),), logit_bias=((0, 50.0),))
    assert found.token_id == 0
    assert found.logprob == pytest.approx(expected[0])
    assert found.top == ((1, pytest.approx(expected[1])), (3, pytest.approx(expected[3])))


def test_zero_logprobs_give_the_drawn_token_alone_and_none_gives_nothing() -> None:
    logits = torch.tensor([[0.0, 3.0]])
    assert logprobs(logits, logprobs=0).top == ()
    assert logprobs(logits) is None


def test_alternatives_of_equal_probability_come_in_order_of_id() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0, 1.0]])
    assert [token for token, _ in logprobs(logits, logprobs=2).top] == [1, 2]
    assert [token for token, _ in logprobs(logits, logprobs=5).top] == [1, 2, 4, 0, 5]
    assert len(logprobs(logits, logprobs=20).top) == 6


def test_the_alternatives_may_be_named() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0, 1.0]])
    found, every = logprobs(logits, logprobs=0, logprob_token_ids=(3, 4, 1)), logprobs(logits, logprobs=6)
    assert found.top == tuple(entry for entry in every.top if entry[0] in (1, 3, 4))
    assert found.logprob == every.logprob and found.rank == every.rank


def test_the_rank_of_a_token_is_its_place_among_the_alternatives() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0, -torch.inf, -torch.inf]]).expand(7, -1)
    found = token_logprobs(logits, range(7), [7] * 7)
    order = [token for token, _ in found[0].top]
    assert [order[entry.rank - 1] for entry in found if entry.rank] == list(range(7))
    assert [entry.rank for entry in found] == [4, 1, 2, 5, 3, 6, 7]


def test_an_impossible_token_has_the_lowest_logprob_that_json_can_carry() -> None:
    logits = torch.tensor([[0.0, -torch.inf]])
    assert logprobs(logits, logprobs=2).top[1] == (1, LOGPROB_FLOOR)


def test_drawing_on_a_device_never_waits_for_a_result() -> None:
    """A meta tensor has no values: whatever asks for one, or mixes in a tensor of the host, raises."""
    everything = spec(
        temperature=0.7, top_k=5, top_p=0.8, min_p=0.1, repetition_penalty=1.2, presence_penalty=0.5,
        frequency_penalty=0.5, logit_bias=((3, 1.0),), bad_words=((4,),), prompt=(1, 2), output=(2, 3), suppressed=(7,),
    )  # fmt: skip
    specs = [everything, spec(temperature=1.0), spec(temperature=1.0, top_p=0.5)]
    tokens = _draw(_adjusted(torch.empty(3, 50, device="meta"), specs), specs)
    assert tokens.shape == (3,) and tokens.device.type == "meta"
