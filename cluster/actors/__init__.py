"""The Ray actors of a cluster, how they are placed, created and found."""
