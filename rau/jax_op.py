"""A merge while JAX traces it: jit, vmap and shard_map, and its gradient. Imported once JAX is in use.

What is traced is the call itself, validator and registry included, which see shapes and dtypes; the backend is given tracers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import jax

from rau import registry
from rau.arrays.jax_ import with_float64
from rau.backends.jax_ import merged_smoothly
from rau.call import NAMES, run
from rau.constraints import Options, bind
from rau.errors import DTypeError, UnsupportedError
from rau.state import AttentionState

_REASON = "JAX traces the call (jit, grad, vmap, shard_map)"


def refuse_out(call: str, states: Sequence[Sequence[Any]]) -> NoReturn:
    """Say that nothing is written into."""
    raise UnsupportedError(f"{call}: out is given, and {_REASON}; JAX arrays cannot be written into. Leave out=None.")


def refuse_running(call: str) -> NoReturn:
    """Say that there is no running state while JAX traces."""
    raise UnsupportedError(
        f"{call}: {_REASON}, and a running state that changes has no place in what is traced. Merge by rau.ring_attention_update "
        'or rau.merge_states, which return a new state: with profile="portable" a float32 one takes 16-bit partial states.'
    )


def through_operator(
    call: str, states: Sequence[Sequence[Any]], actual_seq_qlen: Any, options: Options, out: Any, backend: Any
) -> tuple[Any, ...]:
    """Make a call that JAX traces, with its gradient."""
    if out is not None:
        refuse_out(call, states)
    for state in states:
        for part in state:
            if not isinstance(part, jax.Array):
                raise DTypeError(
                    f"{call}: [array-kind] a {type(part).__name__} among JAX arrays; expected only JAX arrays. Convert it with "
                    "jax.numpy.asarray(...).",
                    ("array-kind",),
                )

    keeps_lse = registry.keeps_lse(backend)

    @jax.custom_vjp
    def merge(*flat: Any) -> tuple[Any, ...]:
        merged = run(call, _states(flat), actual_seq_qlen, options, None, backend)
        return tuple(merged) if options.statistics else (merged.attn_out,)

    def forward(*flat: Any) -> tuple[Any, Any]:
        return merge(*flat), flat  # the inputs themselves: weights are cheap to compute again, and take no memory until then

    def backward(flat: Any, gradients: Any) -> Any:
        problem, _ = bind(call, _states(flat), NAMES[call], actual_seq_qlen, options._replace(check="metadata"), None)

        def smoothly(*flat: Any) -> tuple[Any, ...]:
            merged = merged_smoothly(_states(flat), problem, keeps_lse)
            return tuple(merged)[: len(gradients)]

        with with_float64():
            return jax.vjp(smoothly, *flat)[1](gradients)

    merge.defvjp(forward, backward)
    made = merge(*_alike([part for state in states for part in state]))
    return (*made, *[None] * (3 - len(made)))


def _alike(flat: Sequence[Any]) -> list[Any]:
    """Inside of shard_map, let all arrays count as different on each device where any is: XLA's foreign functions do not do so."""
    varying = [frozenset(getattr(getattr(jax.typeof(part), "manual_axis_type", None), "varying", ())) for part in flat]
    axes: frozenset[str] = frozenset().union(*varying)
    return [
        jax.lax.pcast(part, tuple(sorted(axes - its)), to="varying") if its != axes else part
        for part, its in zip(flat, varying, strict=True)
    ]


def _states(flat: Sequence[Any]) -> list[AttentionState]:
    return [AttentionState(*flat[k : k + 3]) for k in range(0, len(flat), 3)]
