"""KV handoffs of one worker at work: the loops around the sessions of workers.kv_transfer, their streams, and what is handed over."""
