"""What becomes of each request: waiting, placed, in flight, re-run, moved."""
