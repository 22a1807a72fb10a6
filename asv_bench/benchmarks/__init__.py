"""Benchmarks for airspeed velocity, derived from the registry: every backend, n/a where it is not available.

Sizes, states and timer are those of ``python -m rau bench``: they run on commits that have ``rau.cli.bench``.
"""
