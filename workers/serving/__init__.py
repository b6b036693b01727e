"""What a worker does for its routers and peers: one pure core that decides, and the loops around it."""
