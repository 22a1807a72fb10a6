"""Time of an update and of a merge."""

import rau

from .common import BACKENDS, DTYPES, SHAPES, EachBackend, core, states, update


class Update(EachBackend):
    """Into arrays that are given: what a ring with buffers pays."""

    params = [BACKENDS, list(SHAPES), DTYPES]
    param_names = ["backend", "shape", "dtype"]
    repeat = (3, 10, 2.0)

    def setup(self, missing, backend, shape, dtype):
        loaded = self.load(missing, backend)
        self.call = update(loaded, "out=", *states(SHAPES[shape], dtype))

    def time_update(self, missing, backend, shape, dtype):
        self.call()


class Ways(EachBackend):
    """Fresh outputs pay for new pages; in place there are none to write."""

    params = [BACKENDS, ["fresh", "in place"]]
    param_names = ["backend", "how"]
    repeat = (3, 10, 2.0)

    def setup(self, missing, backend, how):
        loaded = self.load(missing, backend)
        self.call = update(loaded, how, *states(SHAPES["SBH 1x1024x32x128"], "float32"))

    def time_update(self, missing, backend, how):
        self.call()


class Merge:
    """K states in one pass."""

    params = [2, 8, 32]
    param_names = ["states"]
    repeat = (3, 10, 2.0)

    def setup(self, count):
        core()
        arrays, self.options = states(("TND", "TND", (256,), 16, 128), "float32", count + 1)
        *self.states, self.out = arrays

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
        self.call = update(core(), "out=", *states(SHAPES["SBH 1x1024x32x128"], "float32"))
        rau.set_num_threads(number)

    def time_update(self, number):
        self.call()
