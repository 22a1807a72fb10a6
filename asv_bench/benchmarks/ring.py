"""What a hop of a ring costs: a partial state into the running float32 state, all of it or one half of each sequence."""

import rau

from .common import BACKENDS, DTYPES, MEDIUM, EachBackend, states


class Hop(EachBackend):
    """All tokens, as in a full ring."""

    params = [BACKENDS, DTYPES]
    param_names = ["backend", "dtype"]
    repeat = (3, 10, 2.0)
    tokens, size = None, MEDIUM

    def setup(self, missing, backend, dtype):
        loaded = self.load(missing, backend)
        part = self.size._replace(lengths=(self.size.tokens // 2,)) if self.tokens else self.size
        whole, = states(self.size, "float32", 1)
        partial, = states(part, dtype, 1)
        own = [rau.AttentionState(*map(loaded.asarray, state)) for state in (whole, partial)]
        self.ring = rau.StreamingMerge(like=own[0], backend=backend, **self.size.options)
        self.partial = own[1]
        self.synchronize = loaded.synchronize
        self.time_hop(missing, backend, dtype)

    def time_hop(self, missing, backend, dtype):
        self.ring.update(*self.partial, tokens=self.tokens)
        self.synchronize()


class HalfHop(Hop):
    """The second half of the tokens, as in a zig-zag ring."""

    tokens = "back"
