"""Both ends of a KV handoff as pure state machines, and what they say to each other."""
