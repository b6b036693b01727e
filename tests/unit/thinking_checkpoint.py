"""A checkpoint's tokenizer whose chat template knows tools and thinking, and whose tags are special tokens."""

from __future__ import annotations

import shutil
from pathlib import Path

import tokenizers
from fake_backend import CHECKPOINT

TEMPLATE = """{%- for tool in tools or [] %}[{{ tool.function.name }}: {{ tool.function.parameters | tojson }}]{% endfor -%}
{%- for message in messages -%}
{{ message.role }}: {% if message.reasoning_content %}({{ message.reasoning_content }}){% endif %}{{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function.name }} {{ call.function.arguments.city }}</tool_call>{% endfor %}
{% endfor -%}
assistant:{% if enable_thinking is not defined or enable_thinking %} <think>
{% endif %}{# <response> <tool_call> #}"""


def make(folder: Path) -> Path:
    """Writes it into a folder that is there."""
    for path in CHECKPOINT.glob("*.json"):
        shutil.copy(path, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(["<think>", "</think>", "<response>", "</response>", "<tool_call>", "</tool_call>"])
    backend.save(str(folder / "tokenizer.json"))
    return folder
