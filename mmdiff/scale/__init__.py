"""Scaling: muP plans from shapes, coordinate checks, and counts of parameters and operations."""
