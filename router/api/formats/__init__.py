"""How models write reasoning, answers and tool calls in their text, and how that is read while it streams."""
