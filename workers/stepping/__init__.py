"""What the step loop is made of; each part owns its state, and none knows a network."""
