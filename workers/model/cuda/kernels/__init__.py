"""Triton kernels with their launchers; each row's bits depend on that row's own sequence alone."""
