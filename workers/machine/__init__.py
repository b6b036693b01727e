"""What this machine has and allows: processors, memory, instruction sets, compiled libraries."""
