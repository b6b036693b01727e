"""Which worker has which role: decided by predicted goodput, carried out safely, and explained."""
