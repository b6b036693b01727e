"""Who may do what between Baton's processes: parties and their certificates, rules, and the gate in front of a worker's server."""
