"""Grids of runs: planned, run on any launcher, kept in one store."""
