"""Where the requests of a simulation come from: files of others, and a seeded generator with like statistics."""
