"""Who belongs to the cluster, in which generation and role, from registrations in the store."""
