"""Grids of runs: what they are, where their rows are kept, what the rows say."""
