"""Puts references from a search before a question, in the words that ERNIE 4.5's model cards recommend for Chinese and for English."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from workers.errors import InvalidRequest

_FIELDS = (
    ("title", "标题"),
    ("published", "文章发布时间"),
    ("content", "内容"),
    ("url", "来源网站网址"),
    ("site", "来源网站的网站名"),
)
"""Of a reference, and what stands before each in the prompt; the cards show this form for both languages."""
MAX_REFERENCES = 256
_KNOWN = frozenset(("references", "date", "language"))
_PROMPTS = {
    "zh": """下面你会收到当前时间、多个不同来源的参考文章和一段对话。你的任务是阅读多个参考文章，并根据参考文章中的信息回答对话中的问题。
以下是当前时间和参考文章：
---------
#当前时间
{date}

#参考文章
{references}

---------
请注意：
1. 回答必须结合问题需求和当前时间，对参考文章的可用性进行判断，避免在回答中使用错误或过时的信息。
2. 当参考文章中的信息无法准确地回答问题时，你需要在回答中提供获取相应信息的建议，或承认无法提供相应信息。
3. 你需要优先根据百科、官网、权威机构、专业网站等高权威性来源的信息来回答问题。
4. 回复需要综合参考文章中的相关数字、案例、法律条文、公式等信息，使你的答案更专业。
5. 当问题属于创作类任务时，需注意以下维度：
   - 态度鲜明：观点、立场清晰明确，避免模棱两可，语言果断直接
   - 文采飞扬：用词精准生动，善用修辞手法，增强感染力
   - 有理有据：逻辑严密递进，结合权威数据/事实支撑论点
---------
下面请结合以上信息，回答问题，补全对话
{question}""",
    "en": """
Below you will be given the current time, multiple references from different sources, and a conversation. Your task is to read the references and use the information in them to answer the question in the conversation.
Here are the current time and the references:
---------
#Current Time
{date}

#References
{references}

---------
Please note:
1. Based on the question’s requirements and the current time, assess the usefulness of the references to avoid using inaccurate or outdated information in the answer.
2. If the references do not provide enough information to accurately answer the question, you should suggest how to obtain the relevant information or acknowledge that you are unable to provide it.
3. Prioritize using information from highly authoritative sources such as encyclopedias, official websites, authoritative institutions, and professional websites when answering questions.
4. Incorporate relevant numbers, cases, legal provisions, formulas, and other details from the references to make your answers more professional.
5. For creative tasks, keep these dimensions in mind:
   - Clear attitude: Clear views and positions, avoid ambiguity, and use decisive and direct language
   - Brilliant writing: Precise and vivid words, good use of rhetoric, and enhance the appeal
   - Well-reasoned: Rigorous logic and progressive, combined with authoritative data/facts to support the argument

---------
Now, using the information above, answer the question and complete the conversation:
{question}""",
}


def with_references(messages: Sequence[Mapping[str, Any]], search: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The conversation with its last message, a user's text, put into the prompt. `search` has `references` (text, or a list of texts
    or objects with title, published, content, url, site), `date`, and `language` (zh or en; by the question when left out).
    Raises InvalidRequest."""
    if unknown := sorted(search.keys() - _KNOWN):
        raise InvalidRequest(
            f"web_search has no {unknown[0]!r:.80}: it has references, date and language", "web_search"
        )
    date, language = search.get("date"), search.get("language")
    if not isinstance(date, str) or not date.strip():
        raise InvalidRequest("web_search.date must be the current time, as text", "web_search")
    question = messages[-1].get("content") if messages and messages[-1].get("role") == "user" else None
    if not isinstance(question, str):
        raise InvalidRequest("web_search needs a last message of the user that is text", "messages")
    if language is None:
        language = "zh" if any("\u4e00" <= character <= "\u9fff" for character in question) else "en"
    if language not in _PROMPTS:
        raise InvalidRequest("web_search.language must be zh or en", "web_search")
    shown = _references(search.get("references"))
    # One after the other: what stands in a reference is no place for the next.
    before, _, rest = _PROMPTS[language].partition("{date}")
    between, _, behind = rest.partition("{references}")
    text = before + date + between + shown + behind.removesuffix("{question}") + question
    return [*map(dict, messages[:-1]), {**messages[-1], "content": text}]


def _references(value: Any) -> str:
    if isinstance(value, str) and value.strip():
        return value
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_REFERENCES:
        raise InvalidRequest(f"web_search.references must be text, or 1 to {MAX_REFERENCES} references", "web_search")
    return "\n\n".join(f"##参考文章{place + 1}\n{_reference(one, place)}" for place, one in enumerate(value))


def _reference(value: Any, place: int) -> str:
    if isinstance(value, str) and value.strip():
        return value
    known = dict(_FIELDS)
    if not isinstance(value, dict) or not value or value.keys() - known.keys():
        raise InvalidRequest(
            f"web_search.references[{place}] must be text, or an object of {', '.join(known)}", "web_search"
        )
    if not all(isinstance(text, str) for text in value.values()):
        raise InvalidRequest(f"web_search.references[{place}] must have texts", "web_search")
    return "\n".join(f"{label}：{value[name]}" for name, label in _FIELDS if name in value)
