"""The engine, its KV cache and the worker that serves them; knows no router and no Ray."""
