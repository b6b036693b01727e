"""Which part of a model each rank of a group owns, and the group operations that bring rows and experts from rank to rank."""
