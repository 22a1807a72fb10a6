"""Ring attention in JAX: shard_map over 4 devices of this host, and its gradient.

From a checkout, in a fresh environment:

    python -m pip install -e '.[jax]'
    python examples/ring_attention_jax.py --causal

Each device holds a part of the queries, keys and values; keys and values go around. Each hop attends to the keys that are there
and merges what comes out into the state so far by `rau.ring_attention_update`: on the CPU by the compiled core, where XLA has the
arrays.

Compared with attention in one piece in float64 are this ring, and the ring as its authors wrote it (Liu, Zaharia and Abbeel 2023),
which carries numerator, denominator and maximum. Printed are the largest errors of the output and of the gradients of q, k and v,
relative to the largest number. Exit status 0 if those of this ring are below --limit, 1 if not.
"""

import argparse
import os
import sys
from functools import partial

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

import rau

RANKS, AXIS = 4, "ranks"
NAMES = ("attn_out", "dq", "dk", "dv")


def scores_of(q, k, queries, keys, causal):
    """Scores of q (B, S, N, D) and k (B, K, N, D): (B, N, S, K), -inf where a key is behind its query."""
    scores = jnp.einsum("bqnd,bknd->bnqk", q, k) / np.sqrt(q.shape[-1])
    return jnp.where(queries[:, None] >= keys, scores, -jnp.inf) if causal else scores


def part(q, k, v, queries, keys, causal):
    """Attention to some of the keys, as a state in layout "BSND"; a query that sees none of them has an empty row."""
    scores = scores_of(q, k, queries, keys, causal)
    maximum = jax.lax.stop_gradient(scores.max(-1, keepdims=True))  # whatever it is, the state stands for the same attention
    weights = jnp.exp(scores - jnp.where(maximum == -jnp.inf, 0.0, maximum))
    total = weights.sum(-1, keepdims=True)
    attn_out = jnp.einsum("bnqk,bknd->bqnd", weights / jnp.where(total == 0, 1.0, total), v)
    return rau.AttentionState(attn_out, maximum, total)


def around(step, first, q, k, v):
    """Take `step` once on each rank's keys, beginning with one's own; k and v go on to the next rank meanwhile."""
    rank, length = jax.lax.axis_index(AXIS), q.shape[1]
    own = jnp.arange(length)
    carried = first
    for hop in range(RANKS):
        source = (rank - hop) % RANKS
        carried = step(carried, q, k, v, rank * length + own, source * length + own)
        k, v = (jax.lax.ppermute(x, AXIS, [(r, (r + 1) % RANKS) for r in range(RANKS)]) for x in (k, v))
    return carried


def ring(q, k, v, causal):
    """The ring of this package."""

    def step(state, *arguments):
        its = part(*arguments, causal)
        return its if state is None else rau.ring_attention_update(*state, *its, layout="BSND", profile="portable")

    return around(step, None, q, k, v).attn_out


def original(q, k, v, causal):
    """The ring of its authors: numerator, denominator and maximum are carried, and divided once at the end."""

    def step(carried, q, k, v, queries, keys):
        numerator, denominator, before = carried
        scores = scores_of(q, k, queries, keys, causal)
        maximum = jnp.maximum(before, scores.max(-1))
        weights = jnp.exp(scores - maximum[..., None])
        correction = jnp.exp(before - maximum)
        numerator = numerator * correction.swapaxes(1, 2)[..., None] + jnp.einsum("bnqk,bknd->bqnd", weights, v)
        return numerator, denominator * correction + weights.sum(-1), maximum

    B, S, N, _ = q.shape
    rows = q[..., 0].swapaxes(1, 2)  # (B, N, S), and as JAX wants it: other numbers on each device
    first = jnp.zeros_like(q), jnp.zeros_like(rows), jnp.full_like(rows, -jnp.inf)
    numerator, denominator, _ = around(step, first, q, k, v)
    return numerator / denominator.swapaxes(1, 2)[..., None]


def whole(q, k, v, causal):
    """Attention in one piece."""
    places = jnp.arange(q.shape[1])
    return jnp.einsum("bnqk,bknd->bqnd", jax.nn.softmax(scores_of(q, k, places, places, causal), -1), v)


def with_gradients(attend, q, k, v, dout):
    """Return the output and the gradients."""
    attn_out, backward = jax.vjp(attend, q, k, v)
    return attn_out, *backward(dout)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=1024, help="of the whole sequence, a multiple of 4 (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--limit", type=float, default=1e-5, help="largest error allowed (default: %(default)s)")
    given = parser.parse_args(arguments)
    if given.tokens < RANKS or given.tokens % RANKS:
        parser.error(f"--tokens {given.tokens}: expected a multiple of {RANKS}")

    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((4, 1, given.tokens, given.heads, given.head_dim))
    with jax.enable_x64(True):
        exact = jax.jit(partial(with_gradients, partial(whole, causal=given.causal)))(*map(jnp.asarray, inputs))
        exact = [np.asarray(part) for part in exact]
    mesh, split = Mesh(jax.devices()[:RANKS], (AXIS,)), PartitionSpec(None, AXIS)
    worst = {}
    for name, attend in (("rau", ring), ("as its authors wrote it", original)):
        sharded = jax.shard_map(partial(attend, causal=given.causal), mesh=mesh, in_specs=split, out_specs=split)
        found = jax.jit(partial(with_gradients, sharded))(*(jnp.asarray(each, jnp.float32) for each in inputs))
        pairs = zip(found, exact, strict=True)
        errors = [float(np.abs(np.asarray(its) - right).max() / np.abs(right).max()) for its, right in pairs]
        print(f"{name:24}", *(f"{which} {error:.2e}" for which, error in zip(NAMES, errors, strict=True)))
        worst[name] = max(errors)
    print(f"{RANKS} devices, {given.tokens} tokens{', causal' * given.causal}")
    return 0 if worst["rau"] <= given.limit else 1


if __name__ == "__main__":
    sys.exit(main())
