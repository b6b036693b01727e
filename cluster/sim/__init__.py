"""The product under a virtual clock: simulated time, network, model steps, clients and faults; nothing of the product is written twice here."""
