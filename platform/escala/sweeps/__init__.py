"""Sweeps: which runs to make (design), Ray Tune's trials, and the points for a law."""
