"""Turns conversations into token ids and marks the tokens that are answers; it is the only place that knows the template."""

from collections.abc import Sequence

from tasks import Exercise
from tokenizers import Tokenizer

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<|begin_of_sentence|>", "<|end_of_sentence|>")
PAD_ID, BOS_ID, EOS_ID, BEGIN_ID, END_ID = range(len(SPECIAL_TOKENS))

# The template of the published ERNIE 4.5 text models: begin token, `User: ...\n`, `Assistant: ...` closed by the end token.
CHAT_TEMPLATE = """\
{%- if not add_generation_prompt is defined -%}
    {%- set add_generation_prompt = true -%}
{%- endif -%}
{{- "<|begin_of_sentence|>" -}}
{%- for message in messages -%}
    {%- if message["role"] == "system" -%}
        {{- message["content"] + "\\n" -}}
    {%- elif message["role"] == "user" -%}
        {{- "User: " + message["content"] + "\\n" -}}
    {%- elif message["role"] == "assistant" -%}
        {{- "Assistant: " + message["content"] + "<|end_of_sentence|>" -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "Assistant: " -}}
{%- endif -%}
"""


def encode_turn(tokenizer: Tokenizer, turn: Exercise, rendered: bool = False) -> tuple[list[int], list[bool]]:
    """Token ids of one turn and, for each, whether it is part of the answer.

    The question ends in `Assistant: `, and the answer is encoded apart from it, because that is what generation makes of
    it. The same turn rendered again as history may merge the blank with the first word of the answer; `rendered` gives
    those tokens, and marks none as an answer.
    """
    question = f"User: {turn.question}\nAssistant: "
    if rendered:
        ids = [*tokenizer.encode(question + turn.answer).ids, END_ID]
        return ids, [False] * len(ids)
    prompt_ids = tokenizer.encode(question).ids
    answer_ids = [*tokenizer.encode(turn.answer).ids, END_ID]
    return prompt_ids + answer_ids, [False] * len(prompt_ids) + [True] * len(answer_ids)


def encode_chat(
    tokenizer: Tokenizer, turns: Sequence[Exercise], system: str | None = None
) -> tuple[list[int], list[bool]]:
    """Token ids of a whole conversation, and the marks of its answers."""
    ids, marks = [BEGIN_ID], [False]
    if system is not None:
        system_ids = tokenizer.encode(system + "\n").ids
        ids += system_ids
        marks += [False] * len(system_ids)
    for turn in turns:
        turn_ids, turn_marks = encode_turn(tokenizer, turn)
        ids += turn_ids
        marks += turn_marks
    return ids, marks
