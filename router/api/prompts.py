"""Turns what a client wrote - a prompt in one of four forms, or a conversation - into prompts of token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from router.api.formats.formats import THINK
from router.api.problems import rejected
from router.api.tools import read_calls
from workers.errors import InvalidRequest
from workers.status import ModelInfo
from workers.text.tokenizer import Tokenizer

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_PARTS = ("text", "input_text", "output_text", "refusal", "thinking")
_UNSUPPORTED_KEYS = ("function_call", "audio")
_RESERVED_NAMES = frozenset(("self", "messages", "tools", "add_generation_prompt"))


@dataclass(frozen=True, slots=True)
class Prompt:
    """`text` is what the client wrote; None when it sent token ids or a conversation."""

    token_ids: tuple[int, ...]
    text: str | None = None
    opens_reasoning: bool = False
    """A conversation whose template ends inside the model's reasoning."""
    rendered: str = ""
    """The text of a conversation, where these are its tokens and control tokens in it are none of a client's."""
    turn_ends: tuple[int, ...] = ()
    """Where the assistants' messages end in it."""

    def end(self, num_kept: int | None) -> Prompt:
        """Its last tokens; None: all of them."""
        if num_kept is None or len(self.token_ids) <= num_kept:
            return self
        return Prompt(self.token_ids[-num_kept:], None, self.opens_reasoning)


def read_prompts(
    value: Any, tokenizer: Tokenizer, info: ModelInfo, add_special_tokens: bool, num_kept: int | None = None
) -> list[Prompt]:
    """A string, strings, token ids, or arrays of token ids; of longer ones only the last `num_kept` tokens. Raises InvalidRequest
    naming `prompt`, or Rejected when one is too long."""
    texts: list[str] = []
    arrays: list[list[Any]] = []
    match value:
        case str():
            texts = [value]
        case [str(), *_] if all(isinstance(item, str) for item in value):
            texts = value
        case [int(), *_]:
            arrays = [value]
        case [list(), *_] if all(isinstance(item, list) for item in value):
            arrays = value
        case _:
            what = "must be a string, an array of strings, an array of token ids, or an array of arrays of token ids"
            raise InvalidRequest(f"prompt {what}, and not empty", "prompt")
    for text in texts:
        check_length(tokenizer.least_tokens(text), info, "prompt", at_least=True)
    for array in arrays:
        check_length(min(len(array), num_kept or len(array)), info, "prompt")
    prompts = [Prompt(tuple(tokenizer.encode(text, add_special_tokens)), text) for text in texts]
    prompts += [Prompt(check_token_ids(array, info.vocab_size, "prompt")) for array in arrays]
    prompts = [prompt.end(num_kept) for prompt in prompts]
    for prompt in prompts:
        check_length(len(prompt.token_ids), info, "prompt")
    if not all(prompt.token_ids for prompt in prompts):
        raise InvalidRequest("prompt must have at least one token", "prompt")
    return prompts


def check_length(num_tokens: int, info: ModelInfo, param: str, max_tokens: int = 1, at_least: bool = False) -> None:
    """Raises Rejected when prompt and output cannot both fit the context. `at_least`: there may be more tokens. Where the prompt
    would fit with a shorter output it is max_tokens that is wrong: clients shorten their history on `context_length_exceeded`."""
    if num_tokens < info.max_model_len < num_tokens + max_tokens:
        raise InvalidRequest(
            f"with {num_tokens} tokens in {param}, max_tokens is at most {info.max_model_len - num_tokens} here, not {max_tokens}; "
            "clamp_max_tokens: true cuts it to that",
            "max_tokens",
        )
    if num_tokens + max_tokens > info.max_model_len:
        message = (
            f"this model's maximum context length is {info.max_model_len} tokens; "
            f"{'at least ' if at_least else ''}{num_tokens} in {param} and {max_tokens} to generate do not fit"
        )
        raise rejected(400, "context_length_exceeded", message, param)


def check_token_ids(token_ids: Sequence[Any], vocab_size: int, param: str) -> tuple[int, ...]:
    """The ids, every one in the vocabulary. Raises InvalidRequest."""
    for token_id in token_ids:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise InvalidRequest(f"{param} needs token ids from 0 to {vocab_size - 1}, not {token_id!r:.80}", param)
    return tuple(token_ids)


def read_chat(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    info: ModelInfo,
    add_generation_prompt: bool,
    add_special_tokens: bool,
    template_kwargs: Mapping[str, Any],
    allow_control_tokens: bool,
    tools: Sequence[Mapping[str, Any]] | None = None,
    goes_on: bool = False,
    num_kept: int | None = None,
) -> Prompt:
    """One conversation as a prompt. Raises InvalidRequest naming the message that cannot be used, or Rejected when it is too long."""
    conversation = render_chat(messages, tokenizer, add_generation_prompt, template_kwargs, tools, goes_on)
    check_length(tokenizer.least_tokens(conversation.text), info, "messages", at_least=True)
    token_ids = encode_chat(conversation, tokenizer, add_special_tokens, allow_control_tokens)
    if not token_ids:
        raise InvalidRequest("messages give an empty prompt", "messages")
    prompt = Prompt(tuple(token_ids), None, _opens_reasoning(conversation.text, messages))
    if not add_special_tokens and not goes_on and not tokenizer.control.is_in(conversation.messages):
        prompt = replace(prompt, rendered=conversation.text, turn_ends=_turn_ends(conversation))
    prompt = prompt.end(num_kept)
    check_length(len(prompt.token_ids), info, "messages")
    return prompt


def _turn_ends(conversation: Conversation) -> tuple[int, ...]:
    """As far as messages stand in the text as they are."""
    ends, place = [], 0
    for message in conversation.messages:
        found = conversation.text.find(message["content"], place)
        if found < 0:
            break
        place = found + len(message["content"])
        if message["role"] == "assistant":
            ends.append(place)
    return tuple(ends)


def _opens_reasoning(text: str, messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether reasoning stands open behind the last message, whatever that message itself says."""
    said = messages[-1].get("content")
    written = text.rfind(said) if isinstance(said, str) and said else -1
    end = text[written + len(said) :] if said and written >= 0 else text
    return end.rfind(THINK[0]) > end.rfind(THINK[1])


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages that can be used, as the template sees them, and the text that it makes of them."""

    messages: list[dict[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None
    add_generation_prompt: bool
    template_kwargs: Mapping[str, Any]
    goes_on: bool
    """The last message, an assistant's, is not closed: the answer continues it."""
    text: str


def render_chat(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    add_generation_prompt: bool,
    template_kwargs: Mapping[str, Any],
    tools: Sequence[Mapping[str, Any]] | None = None,
    goes_on: bool = False,
) -> Conversation:
    """Reads messages and renders them. Raises InvalidRequest naming the message that cannot be used."""
    if not messages:
        raise InvalidRequest("messages must not be empty", "messages")
    for name in template_kwargs:
        if name in _RESERVED_NAMES or not name.isidentifier():
            raise InvalidRequest(f"chat_template_kwargs must not set {name!r:.80}", "chat_template_kwargs")
    plain = [_read_message(message, f"messages[{place}]") for place, message in enumerate(messages)]
    if "tool" not in tokenizer.chat_template(bool(tools)):
        for place, message in enumerate(plain):
            if message["role"] == "tool" or message.get("tool_calls"):
                raise InvalidRequest(f"messages[{place}]: this model's chat template knows no tools", "messages")
    if goes_on and (
        plain[-1]["role"] != "assistant" or plain[-1].get("tool_calls") or not plain[-1]["content"].strip()
    ):
        raise InvalidRequest(
            "continue_final_message needs a last message of the assistant that has text", "continue_final_message"
        )
    conversation = Conversation(plain, tools, add_generation_prompt and not goes_on, template_kwargs, goes_on, "")
    return replace(conversation, text=_text_of(conversation, plain, tokenizer))


def _text_of(conversation: Conversation, messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> str:
    """What the template makes of these messages, which say what those of the conversation say."""
    kwargs = conversation.template_kwargs
    text = tokenizer.render_chat(messages, conversation.tools, conversation.add_generation_prompt, **kwargs)
    if not conversation.goes_on:
        return text
    said = messages[-1]["content"].lstrip()
    start = text.rfind(said.rstrip())
    if start < 0:
        raise InvalidRequest("the chat template does not show the last message as it is", "continue_final_message")
    return text[: start + len(said)] if text.startswith(said, start) else text[: start + len(said.rstrip())]


def encode_chat(
    conversation: Conversation, tokenizer: Tokenizer, add_special_tokens: bool, allow_control_tokens: bool
) -> list[int]:
    """Its tokens; control tokens that stand in messages are letters unless they are allowed."""
    control = tokenizer.control
    if allow_control_tokens or not control.is_in(conversation.messages):
        return tokenizer.encode(conversation.text, add_special_tokens)
    marked = control.marked(conversation.messages)
    return control.encode(_text_of(conversation, marked, tokenizer), add_special_tokens)


def _read_message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise InvalidRequest(f"{where}.role must be one of {', '.join(_ROLES)}; it is {role!r:.80}", "messages")
    for key in _UNSUPPORTED_KEYS:
        if message.get(key):
            raise InvalidRequest(f"{where}.{key} is not supported", "messages")
    calls = message.get("tool_calls")
    content = message.get("content")
    if role != "assistant" and calls:
        raise InvalidRequest(f"{where}.tool_calls belongs to an assistant's message", "messages")
    if (role == "tool") != (message.get("tool_call_id") is not None):
        raise InvalidRequest(
            f"{where}.tool_call_id belongs to every message of the role tool, and to no other", "messages"
        )
    thought: list[str] = []
    if content is None and role in ("user", "assistant"):  # as clients send what was said without words
        content = ""
    if isinstance(content, list):
        parts = [_read_part(part, f"{where}.content[{place}]") for place, part in enumerate(content)]
        thought = [text for text, is_thought in parts if is_thought]
        content = "\n".join(text for text, is_thought in parts if not is_thought)
    if not isinstance(content, str):
        raise InvalidRequest(f"{where}.content must be a string or an array of text parts", "messages")
    plain = {**message, "role": _ROLES[role], "content": content}
    if thought:
        plain.setdefault("reasoning_content", "\n".join(thought))
    if calls:
        plain["tool_calls"] = read_calls(calls, f"{where}.tool_calls")
    return plain


def _read_part(part: Any, where: str) -> tuple[str, bool]:
    """Its text, and whether that is reasoning. Histories hold parts as several APIs write them."""
    match part:
        case str(text) | {"type": "text" | "input_text" | "output_text", "text": str(text)}:
            return text, False
        case {"type": "refusal", "refusal": str(text)}:
            return text, False
        case {"type": "thinking", "thinking": str(text)}:
            return text, True
        case {"type": str(kind)} if kind not in _PARTS:
            raise InvalidRequest(f"{where}: content of type {kind!r:.80} is not supported", "messages")
        case _:
            raise InvalidRequest(f"{where} must be a text part", "messages")
