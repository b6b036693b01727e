"""Makes certificates: the authority of a cluster, and files of its processes."""
