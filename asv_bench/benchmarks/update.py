"""Time of an update: by backend, size and dtype, by what it writes to, by its rows, by threads."""

import rau

from .common import BACKENDS, DTYPES, MEDIUM, SIZES, EachBackend, core, states, update


class Update(EachBackend):
    """Into arrays that are given: what a ring with buffers pays."""

    params = [BACKENDS, list(SIZES), DTYPES]
    param_names = ["backend", "size", "dtype"]
    repeat = (3, 10, 2.0)

    def setup(self, missing, backend, size, dtype):
        loaded = self.load(missing, backend, "out=")
        self.call = update(loaded, "out=", SIZES[size], states(SIZES[size], dtype))

    def time_update(self, missing, backend, size, dtype):
        self.call()


class Ways(EachBackend):
    """Fresh outputs pay for new pages; in place there are none to write."""

    params = [BACKENDS, ["fresh", "in place"]]
    param_names = ["backend", "how"]
    repeat = (3, 10, 2.0)

    def setup(self, missing, backend, how):
        loaded = self.load(missing, backend, how)
        self.call = update(loaded, how, MEDIUM, states(MEDIUM, "float32"))

    def time_update(self, missing, backend, how):
        self.call()


class Rows:
    """Head dimensions that are no multiple of a vector, and rows of float64: about as many elements at each."""

    params = [[22, 40, 64, 80, 96, 128, 600], ["float32", "bfloat16", "float64"]]
    param_names = ["head_dim", "dtype"]
    repeat = (3, 10, 2.0)

    def setup(self, head_dim, dtype):
        size = MEDIUM._replace(lengths=(MEDIUM.tokens * MEDIUM.head_dim // head_dim,), head_dim=head_dim)
        self.call = update(core(), "out=", size, states(size, dtype))

    def time_update(self, head_dim, dtype):
        self.call()


class PartOfAnArray:
    """Every array is a view: the first half of the heads, or of the tokens, of a larger one."""

    params = ["heads", "tokens"]
    param_names = ["half"]
    repeat = (3, 10, 2.0)

    def setup(self, half):
        size = MEDIUM._replace(layout="BSND")
        part = slice(0, (size.heads if half == "heads" else size.tokens) // 2)
        where = (slice(None),) * (2 if half == "heads" else 1) + (part,), (slice(None),) * (1 if half == "heads" else 2) + (part,)
        arrays = [
            rau.AttentionState(state.attn_out[where[0]], *(stats[where[1]] for stats in state[1:]))
            for state in states(size, "float32")
        ]
        self.call = update(core(), "out=", size, arrays)

    def time_update(self, half):
        self.call()


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
