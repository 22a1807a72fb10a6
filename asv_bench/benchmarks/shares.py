"""Figures that hold on a noisy machine: what is compared is measured in turn, in one process.

All are such that less is better, as asv takes it.
"""

import rau
from rau.cli.bench.peers import COMPILED, EAGER, WRITTEN, Peers
from rau.cli.bench.survey import measure

from . import probes
from .common import BACKENDS, DTYPES, LARGE, MEDIUM, WITH_LARGE, EachBackend, core

_SIZE, _SECONDS = (LARGE, 4.0) if WITH_LARGE else (MEDIUM, 1.0)


class Measured:
    """Roof, compiled core and, in float32, composites in turn; measured once for all the benchmarks below."""

    timeout = 240

    def setup_cache(self):
        found = {}
        if not rau.registry.status()[0].available:
            return found
        try:
            composites = Peers(compiled=WITH_LARGE)  # compiling takes long
        except ImportError:
            composites = None
        for dtype in probes.dtypes():
            beside = composites if dtype == "float32" else None
            group = measure(_SIZE, dtype, 3 * _SECONDS if beside else _SECONDS, [rau.registry.get("cython")], beside)
            found |= {(row.how, dtype): 1 / row.share.median for row in group.rows}
            found |= {(how, row.name): 1 / slower for row in group.peers for how, slower in row.slower.items()}
        return found

    def setup(self, found, *key):
        if key not in found:
            raise NotImplementedError("not to be had here: no core, no torch, no ml_dtypes, or RAU_BENCH_LARGE is not set")


class Roof(Measured):
    """Time of an update by that of a triad that moves as many bytes: 1 by its share of the roof."""

    params = [["out=", "in place"], DTYPES]
    param_names = ["how", "dtype"]
    unit = "triads"

    def track_by_triad(self, found, how, dtype):
        return found[how, dtype]


class Composites(Measured):
    """Time of an update by that of torch's composite."""

    params = [["out=", "fresh"], [EAGER, WRITTEN, COMPILED]]
    param_names = ["how", "composite"]
    unit = "composites"

    def track_by_composite(self, found, how, composite):
        return found[how, composite]


class Accuracy(EachBackend):
    """Worst error by its bound: more than the backend's tolerance, which is 1 for all of ours on a CPU, is wrong."""

    params = [BACKENDS]
    param_names = ["backend"]
    unit = "of the bound"

    def setup(self, missing, backend):
        self.backend = self.load(missing, backend)

    def track_worst(self, missing, backend):
        return max(probes.accuracy(self.backend)["share"].values())


class SmallestCall:
    """The smallest call by a loop of plain Python (NumPy's arrays), and by torch's eager composite (torch's tensors)."""

    params = [["out=", "fresh"], [probes.PYTHON, EAGER]]
    param_names = ["how", "other"]
    unit = "of the other"

    def setup(self, how, other):
        core()
        if other == EAGER:
            try:
                Peers(False)
            except ImportError as error:
                raise NotImplementedError("torch is not installed") from error

    def track_by_other(self, how, other):
        found = probes.smallest(rau.get_num_threads(), _SECONDS, other == EAGER)
        return found[how] / found[other]


class Sequences:
    """10,000 sequences of one token by one sequence of 10,000, packed."""

    unit = "times"

    def setup(self):
        core()

    def track_short_by_long(self):
        return probes.sequences(rau.get_num_threads(), 10_000, _SECONDS)["ratio"]
