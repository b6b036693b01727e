"""What must outlive a process: leases, desired roles, generations, API keys."""
