"""What the router knows of each worker: membership, load, cached prefixes, what it has sent there."""
