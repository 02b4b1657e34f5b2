"""Protein conformations (ConfDiff) and stochastic solvers."""
