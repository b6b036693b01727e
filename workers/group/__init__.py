"""A worker that is several processes: ranks that a leader forms into a group and drives step by step."""
