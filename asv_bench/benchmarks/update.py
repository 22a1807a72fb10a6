"""Time of an update and of a merge."""

import rau
from rau.cli.bench.workload import SERVING

from .common import BACKENDS, DTYPES, MEDIUM, SIZES, EachBackend, core, states, update


class Update(EachBackend):
    """Into arrays that are given: what a ring with buffers pays."""

    params = [BACKENDS, list(SIZES), DTYPES]
    param_names = ["backend", "size", "dtype"]
    repeat = (3, 10, 2.0)

    def setup(self, missing, backend, size, dtype):
        loaded = self.load(missing, backend)
        self.call = update(loaded, "out=", SIZES[size], states(SIZES[size], dtype))

    def time_update(self, missing, backend, size, dtype):
        self.call()


class Ways(EachBackend):
    """Fresh outputs pay for new pages; in place there are none to write."""

    params = [BACKENDS, ["fresh", "in place"]]
    param_names = ["backend", "how"]
    repeat = (3, 10, 2.0)

    def setup(self, missing, backend, how):
        loaded = self.load(missing, backend)
        self.call = update(loaded, how, MEDIUM, states(MEDIUM, "float32"))

    def time_update(self, missing, backend, how):
        self.call()


class Merge:
    """K states in one pass."""

    params = [2, 8, 32]
    param_names = ["states"]
    repeat = (3, 10, 2.0)

    def setup(self, count):
        core()
        size = SERVING._replace(lengths=(256,))
        *self.states, self.out = states(size, "float32", count + 1)
        self.options = size.options

    def time_merge(self, count):
        rau.merge_states(self.states, out=self.out, backend="cython", **self.options)


class Threads:
    """The compiled core by its threads."""

    params = [1, 2, 4, 8]
    param_names = ["threads"]
    repeat = (3, 10, 2.0)

    def setup(self, number):
        if number > rau.get_num_threads():
            raise NotImplementedError("fewer CPUs")
        self.call = update(core(), "out=", MEDIUM, states(MEDIUM, "float32"))
        rau.set_num_threads(number)

    def time_update(self, number):
        self.call()
