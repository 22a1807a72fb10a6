"""Benchmarks for airspeed velocity, derived from the registry: every backend, n/a where it is not available.

asv runs these files against every commit: `workload.py` and what times calls use rau's public names alone. What
compares (shares.py) uses what ``python -m rau bench`` measures with, and is n/a for a commit that lacks it.
"""
