"""Reads a conversation, and what its body says about the answer: its reasoning, its calls, its form. Draws up no requests."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from router.api.formats.formats import THINK, OutputFormat, output_format
from router.api.formats.grammars import (
    around_answer,
    behind_reasoning,
    call_rule,
    calls_rule,
    one_of,
    text_with_calls,
)
from router.api.problems import Rejected, rejected
from router.api.prompts import Prompt, check_length, check_token_ids, read_chat
from router.api.schema import ChatBody, GenerationBody
from router.api.structure import FORM_FIELDS, Wanted, read_structure
from router.api.tools import MAX_TOOLS, THINKING_FIELDS, ToolUse, read_budget, read_thinking, read_tools
from router.api.web_search import with_references
from router.config import ApiConfig
from workers.errors import InvalidRequest, Refusal, Refused
from workers.request import ThinkingBudget
from workers.status import ModelInfo
from workers.text.tokenizer import Tokenizer

_AS_IT_STANDS = OutputFormat()


@dataclass(frozen=True, slots=True)
class Speech:
    """How the text of an answer is read. The default: as it stands."""

    form: OutputFormat = _AS_IT_STANDS
    opens_reasoning: bool = False
    max_calls: int = 0
    """Calls of tools that are shown; 0: none were offered, and what looks like one is text."""
    include_reasoning: bool = True
    reasoning_end: int | None = None
    """The token that ends reasoning, where one token does."""
    prefix: str = ""
    """What content begins with: the message that the answer goes on from, where it is to be shown again."""
    budget: ThinkingBudget | None = None
    wanted: Wanted | None = None
    """What is wanted of the form, where it is enforced."""

    @property
    def is_read(self) -> bool:
        """Whether more than the bare text is shown, or less."""
        return self.form != _AS_IT_STANDS or bool(self.prefix)


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation that has been read, and what it says about the answer."""

    info: ModelInfo
    prompt: Prompt
    use: ToolUse | None
    form: OutputFormat
    may_think: bool


def read_conversation(body: ChatBody, model: ModelInfo | None, tokenizer: Tokenizer, config: ApiConfig) -> Chat:
    """Raises InvalidRequest, Rejected (unknown model, too long) or Refused (no model is known yet)."""
    info = require_model(body.model, model)
    if body.chat_template:
        if not config.allow_chat_template:
            raise InvalidRequest(
                "chat_template is not allowed here (router.api.allow_chat_template): the model's own is used",
                "chat_template",
            )
        tokenizer = tokenizer.with_template(body.chat_template)
    kwargs: dict[str, Any] = {}
    if not body.model_fields_set.isdisjoint(THINKING_FIELDS):
        kwargs = read_thinking(body.chat_template_kwargs, body.reasoning_effort, body.enable_thinking, body.thinking)
    if body.continue_final_message and body.add_generation_prompt:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt cannot both be true", "continue_final_message"
        )
    if body.documents:
        if "documents" not in tokenizer.chat_template(bool(body.tools)):
            raise InvalidRequest("this model's chat template takes no documents", "documents")
        kwargs.setdefault("documents", body.documents)
    use = None
    if body.tools or body.tool_choice is not None:
        use = read_tools(body.tools, body.tool_choice, body.parallel_tool_calls)
    template = tokenizer.chat_template(use is not None)
    form = output_format(config.reasoning_parser, config.tool_parser, template)
    if use is not None and ("tools" not in template or form.call is None):
        why = (
            "its chat template takes none"
            if "tools" not in template
            else "router.api.tool_parser names no format of calls"
        )
        raise InvalidRequest(f"this model cannot be offered tools: {why}", "tools")
    may_think = kwargs.get("enable_thinking") is not False
    if body.prompt_token_ids is not None:
        prompt = _given_prompt(body, info, tokenizer)
        return Chat(info, prompt, use, form if use else replace(form, call=None), may_think or prompt.opens_reasoning)
    prompt = read_chat(
        with_references(body.messages, body.web_search) if body.web_search else body.messages,
        tokenizer,
        info,
        body.add_generation_prompt is not False,
        bool(body.add_special_tokens),
        kwargs,
        config.allow_control_tokens,
        use.tools if use else None,
        bool(body.continue_final_message),
        num_kept(body, info),
    )
    return Chat(info, prompt, use, form if use else replace(form, call=None), may_think or prompt.opens_reasoning)


def _given_prompt(body: ChatBody, info: ModelInfo, tokenizer: Tokenizer) -> Prompt:
    """A conversation that the client has rendered and tokenized itself. Raises InvalidRequest or Rejected."""
    name = "prompt_token_ids"
    for other in ("messages", "documents", "web_search", "continue_final_message", "echo"):
        if getattr(body, other):
            raise InvalidRequest(f"{name} stands for the whole prompt: leave {other} out", name)
    token_ids = body.prompt_token_ids or []
    check_length(len(token_ids), info, name)
    if not token_ids:
        raise InvalidRequest(f"{name} must have at least one token", name)
    prompt = Prompt(check_token_ids(token_ids, info.vocab_size, name))
    text = tokenizer.decode(prompt.token_ids, skip_special_tokens=False)
    return replace(prompt, opens_reasoning=text.rfind(THINK[0]) > text.rfind(THINK[1]))


def speech_of(body: ChatBody, chat: Chat, tokenizer: Tokenizer) -> Speech:
    """How the answer to a conversation is read, and what is enforced of it. Raises InvalidRequest."""
    use, form = chat.use, chat.form
    speech = Speech(
        form,
        chat.prompt.opens_reasoning,
        (MAX_TOOLS if use.is_parallel else 1) if use else 0,
        body.include_reasoning is not False,
        tokenizer.token_id(form.reasoning[1]) if form.reasoning else None,
        _echoed(body) if body.echo else "",
    )
    budget = _thinking_budget(body, speech, tokenizer) if chat.may_think else None
    return replace(speech, budget=budget, wanted=_wanted(body, use, speech, tokenizer, chat.may_think))


def _echoed(body: ChatBody) -> str:
    """The last message, where the answer is of the same role."""
    last = body.messages[-1]
    return str(last.get("content") or "") if last.get("role") == "assistant" else ""


def _thinking_budget(body: ChatBody, speech: Speech, tokenizer: Tokenizer) -> ThinkingBudget | None:
    """None: reasoning is as long as it is. A model that marks none has nothing to be bounded."""
    if body.model_fields_set.isdisjoint(THINKING_FIELDS):
        return None
    budget = read_budget(body.thinking, body.thinking_token_budget, body.reasoning_max_tokens)
    tags, end = speech.form.reasoning, speech.reasoning_end
    if budget is None or tags is None:
        return None
    start = None if speech.opens_reasoning else tokenizer.token_id(tags[0])
    if end is None or (start is None and not speech.opens_reasoning):
        raise InvalidRequest(f"{budget[1]} needs a vocabulary with tokens for {' and '.join(tags)}", budget[1])
    closing = (*tokenizer.encode("\n"), end, *tokenizer.encode("\n\n"))
    return ThinkingBudget(budget[0], end, closing, start)


def _wanted(
    body: ChatBody, use: ToolUse | None, speech: Speech, tokenizer: Tokenizer, may_think: bool
) -> Wanted | None:
    """The form of the answer, of the calls in it and of what stands around them; None: it may be anything."""
    form, control = speech.form, tokenizer.added_tokens
    answer = None if body.model_fields_set.isdisjoint(FORM_FIELDS) else read_structure(body, control)
    is_enforced = use is not None and (use.is_required or any(tool.is_strict for tool in use.callable()))
    if answer is None and not is_enforced:
        return None
    param, schema = ("tools", None) if answer is None else (answer.param, answer.schema)
    rule = None if answer is None else around_answer(answer.rule, form, control)
    if use is not None and form.call is not None:
        call = call_rule(use.callable(), form.call, control)
        calls = calls_rule(call, use.is_parallel)
        if use.is_required:
            rule = calls
        elif rule is None:
            rule = text_with_calls(call, form, use.is_parallel, control)
        else:
            rule = one_of([rule, calls])
    assert rule is not None
    if may_think:
        rule = behind_reasoning(rule, form, speech.opens_reasoning, control)
    return Wanted(rule, param, schema)


def num_kept(body: GenerationBody, info: ModelInfo) -> int | None:
    """Tokens of a longer prompt that are kept, its last ones; None: it is refused. -1 stands for all that leave room for max_tokens."""
    asked_for = body.truncate_prompt_tokens
    if asked_for is None:
        return None
    asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if asked_for == -1:
        return max(1, info.max_model_len - max(1, asked or 1))
    if not 1 <= asked_for <= info.max_model_len:
        raise InvalidRequest(
            f"truncate_prompt_tokens must be -1 or from 1 to {info.max_model_len}", "truncate_prompt_tokens"
        )
    return asked_for


def require_model(name: str | None, model: ModelInfo | None) -> ModelInfo:
    """The served model, if that is the one meant. Leaving the name out means the served one."""
    if model is None:
        raise Refused(Refusal.NO_WORKERS, "no worker has reported a model yet")
    if name is not None and name != model.name:
        raise no_model(name)
    return model


def no_model(name: str) -> Rejected:
    return rejected(404, "model_not_found", f"the model {name!r:.200} does not exist", "model")
