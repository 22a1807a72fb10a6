"""Calls on a backend's own arrays, whatever they are, with NumPy arrays going in and coming out."""

import numpy as np

import rau


def update(backend, prev, cur, *arguments, **options):
    """ring_attention_update of two triples of NumPy arrays."""
    instance = rau.registry.get(backend)
    own = [instance.asarray(np.asarray(part)) for part in (*prev, *cur)]
    result = rau.ring_attention_update(*own, *arguments, backend=backend, **options)
    return rau.AttentionState(*(np.array(instance.to_numpy(part)) for part in result))


def merge(backend, states, *arguments, **options):
    """merge_states of triples of NumPy arrays."""
    instance = rau.registry.get(backend)
    own = [rau.AttentionState(*(instance.asarray(np.asarray(part)) for part in state)) for state in states]
    result = rau.merge_states(own, *arguments, backend=backend, **options)
    return rau.AttentionState(*(np.array(instance.to_numpy(part)) for part in result))
