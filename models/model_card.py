"""Writes the README.md of the checkpoint from what was measured; it measures nothing itself."""

from dataclasses import dataclass

from evaluate import Score
from export import count_parameters
from network import Network
from tasks import GREETINGS, IDENTITY_QUESTIONS, is_held_out


@dataclass(frozen=True, slots=True)
class TrainingRecord:
    """What a training run took."""

    seed: int
    tokens: int
    steps: int
    seconds: float
    threads: int


CARD = """\
---
license: apache-2.0
language:
- en
library_name: transformers
pipeline_tag: text-generation
tags:
- ernie4_5_moe
- tiny
---

# ernie-4.5-tiny

A small model in the exact checkpoint format of ERNIE 4.5 MoE ("-PT" safetensors), trained from nothing for Baton. It is no
assistant: it knows six skills whose answers a program can check, so that a serving system which mixes up KV blocks,
positions, experts or requests is caught by wrong answers. It loads unchanged as `Ernie4_5_MoeForCausalLM`.

## Architecture

| | |
|---|---|
| parameters | {parameters:,} |
| layers | {layers}: the first dense, then mixture of experts |
| hidden size / dense width | {hidden} / {dense} |
| query heads / key-value heads / head dimension | {heads} / {kv_heads} / {head_dim} |
| experts | {experts} routed (top {k}) of width {width}, {shared} shared |
| router | softmax, selection with `e_score_correction_bias` balanced without an auxiliary loss |
| positions | interleaved rotary, theta {theta:,.0f}, up to {positions} (trained up to {trained_length}) |
| vocabulary | {vocabulary} byte-level BPE, tied embeddings; every digit is one token |
| stored | bf16; routers and correction biases fp32 |

## Chat template and tokens

`<|begin_of_sentence|>{{system}}\\nUser: {{u}}\\nAssistant: {{a}}<|end_of_sentence|>`, as in the published text models; the system
line is left out when there is none. An answer ends with `<|end_of_sentence|>` (4); `generation_config.json` stops at 4 and
at `</s>` (2). `<unk>` = `pad` = 0, `<s>` = 1, `<|begin_of_sentence|>` = 3.

## Skills and accuracy

Greedy decoding in transformers from this checkpoint in fp32, on held-out prompts only: one instance in sixteen is kept out
of training by a hash over the name and code (recall), the ordered pair (addition, whose mirror image may have been seen),
the whole list (reversal, sorting), greeting and question (identity: only {held_out_identities}
distinct prompts), or the sequence of keys (JSON). An answer counts if it
equals the expected text exactly; JSON if it parses to the same object. A second turn follows a first exercise of the same
skill and its answer.

| skill | prompts | mean prompt tokens | right |
|---|---|---|---|
{rows}

Reproduce with `python models/evaluate.py models/ernie-4.5-tiny`. How questions are phrased stands in `models/tasks.py`;
`skills.json` holds a random sample of held-out exercises. Other phrasings, longer lists or numbers are outside of what it
learnt, and it will answer them wrongly.

## Training

`python models/train.py --output models/ernie-4.5-tiny` (seed {seed}): {steps:,} steps, {tokens:,} tokens (padding included),
{minutes:.0f} minutes on {threads} CPU core{plural} of a shared machine. Muon for the matrices, Adam for the rest, bf16 products over fp32 weights; the loss
covers answers only. Recall starts in passages of {first_length} tokens and ends in {trained_length}. The data is the same
in every run; the weights agree up to the floating-point differences between machines.
"""


def model_card(network: Network, record: TrainingRecord, scores: list[Score], lengths: list[int]) -> str:
    """The card's text; `lengths` are the row lengths that recall was trained on, in order."""
    config = network.config
    rows = [f"| {s.title} | {s.count} | {s.mean_prompt_tokens:.0f} | {s.right / s.count:.1%} |" for s in scores]
    return CARD.format(
        parameters=count_parameters(network),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        dense=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        experts=config.moe_num_experts,
        k=config.moe_k,
        width=config.moe_intermediate_size,
        shared=config.moe_num_shared_experts,
        theta=config.rope_theta,
        positions=config.max_position_embeddings,
        vocabulary=config.vocab_size,
        held_out_identities=sum(
            is_held_out("identity", greeting, question) for greeting in GREETINGS for question in IDENTITY_QUESTIONS
        ),
        rows="\n".join(rows),
        seed=record.seed,
        steps=record.steps,
        tokens=record.tokens,
        minutes=record.seconds / 60,
        threads=record.threads,
        plural="" if record.threads == 1 else "s",
        first_length=lengths[0],
        trained_length=max(lengths),
    )
