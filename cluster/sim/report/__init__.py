"""What a simulation's record says: figures, tables, plots and one page with a time axis."""
