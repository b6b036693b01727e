"""The engine: the step loop over sequences, its thread, and the KV blocks that other workers fill or copy; knows no network."""
