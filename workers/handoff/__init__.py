"""KV handoffs of one worker at work: the asyncio drivers of the sessions of workers.handoff.protocol, and their streams."""
