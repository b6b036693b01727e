"""XXH3-64 while copying, in C++."""
