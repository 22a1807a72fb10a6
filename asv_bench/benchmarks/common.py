"""What the benchmarks share: sizes, backends, and calls of them; all of ``python -m rau bench``'s making."""

import os

import rau
from rau.cli.bench import workload
from rau.cli.bench.workload import LARGE, SEQUENCES, SERVING, Size

WITH_LARGE = os.environ.get("RAU_BENCH_LARGE", "") not in ("", "0")
BACKENDS = rau.registry.names()
DTYPES = list(workload.DTYPES)

MEDIUM = LARGE._replace(lengths=(1024,))  # three float32 states are 57 MB
_SMALL = [
    MEDIUM,
    Size("BSND", (512,), 16, 128, batch=2),
    Size("BNSD", (512,), 16, 128, batch=2),
    Size("TND", (256,), 4, 64),  # vLLM's smallest
    SEQUENCES._replace(heads=8),
]
_BEYOND_64_MB = [
    LARGE,
    LARGE._replace(heads=64),
    LARGE._replace(lengths=(32768,)),
    LARGE._replace(lengths=(65536,)),  # 16-bit only fits into 8 GB
    SEQUENCES,
    SERVING,
    SERVING._replace(heads=64, head_dim=256),
]
SIZES = {str(size): size for size in (_SMALL + _BEYOND_64_MB if WITH_LARGE else _SMALL)}
_MOST = 8 << 30  # bytes of all the arrays of a call with fresh outputs


class EachBackend:
    """Base of what is measured for every backend: n/a where one is not available, which is found out once."""

    def setup_cache(self):
        return {one.name: one.reason for one in rau.registry.status() if not one.available}

    def load(self, missing, name, how="fresh"):
        if name in missing:
            raise NotImplementedError(missing[name])
        backend = rau.registry.get(name)
        if how in ("out=", "in place") and not backend.capabilities.out:
            raise NotImplementedError(f"arrays of {name} cannot be written into")
        return backend


def core():
    """The compiled core's backend; n/a without it."""
    try:
        return rau.registry.get("cython")
    except rau.RauError as error:
        raise NotImplementedError("no compiled core") from error


def states(size, dtype, count=3, lanes=8):
    """Make states; n/a where there is no room or no such dtype."""
    if (count + 1) * size.state_bytes(dtype) > _MOST:
        raise NotImplementedError("more than 8 GB")
    if workload.lacking(dtype):
        raise NotImplementedError(workload.lacking(dtype))
    return workload.states(size, dtype, count, lanes)


def update(backend, how, size, arrays):
    """A function that makes one call and waits for its result; n/a where the backend does not take it."""
    call = workload.modes(size, backend, [rau.AttentionState(*map(backend.asarray, state)) for state in arrays])[how]
    try:
        call()
    except rau.UnsupportedError as error:
        raise NotImplementedError(str(error).partition("\n")[0]) from error
    return call
