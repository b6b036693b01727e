"""What a router expects of its workers: how long steps, prompts, handoffs and tokens will take, fitted to what they report."""
