"""What a merge of K states costs: the splits of a cache after a decode step, two levels of a cascade after a prefill."""

import numpy as np

import rau
from rau.cli.bench.workload import DECODE, SERVING

from .common import core, states


class Decode:
    """32 sequences of one token, their caches in K splits; by what is wanted: a state to go on with, or the output alone."""

    params = [[2, 8, 32, 64], ["state", "output"]]
    param_names = ["splits", "wanted"]

    def setup(self, splits, wanted):
        core()
        self.states = states(DECODE, "bfloat16", splits, lanes=1)
        self.options = DECODE.options | {"statistics": wanted == "state", "backend": "cython"}

    def time_merge(self, splits, wanted):
        rau.merge_states(self.states, **self.options)


class Prefill:
    """4,096 tokens, a shared prefix and the rest, from (out, lse) to the output; by lanes of the statistics."""

    params = [["float32", "bfloat16"], [1, 8]]
    param_names = ["dtype", "lanes"]
    repeat = (3, 10, 2.0)

    def setup(self, dtype, lanes):
        core()
        made = states(SERVING, dtype, 2, lanes=1)
        self.pairs = [(state.attn_out, state.softmax_max[..., 0]) for state in made]
        self.how = {"base": "e", "layout": "TND", "lse_layout": "TN", "lanes": lanes}

    def time_merge(self, dtype, lanes):
        rau.merge_states([rau.AttentionState.from_lse(*pair, **self.how) for pair in self.pairs], layout="TND", backend="cython")


class Pairs:
    """The same two levels from (out, lse) to (out, lse), bfloat16: fresh or in place, of all tokens or of every other run of 64."""

    params = [["fresh", "in place"], ["all", "slice", "mask"]]
    param_names = ["result", "tokens"]
    repeat = (3, 10, 2.0)

    def setup(self, result, tokens):
        core()
        if not hasattr(rau, "merge_lse"):
            raise NotImplementedError("this commit has no merge_lse")
        made = states(SERVING, "bfloat16", 2, lanes=1)
        self.pairs = [(state.attn_out, state.softmax_max[..., 0].copy()) for state in made]
        self.how = {"base": "e", "layout": "TND", "lse_layout": "TN", "backend": "cython"}
        self.how["out"] = self.pairs[0] if result == "in place" else None
        if tokens != "all":
            count = len(made[0].attn_out)
            self.how["tokens"] = slice(0, count // 2) if tokens == "slice" else np.arange(count) // 64 % 2 == 0

    def time_merge(self, result, tokens):
        rau.merge_lse(self.pairs, **self.how)


class Many:
    """K states in one pass, 8 lanes, into arrays that are given."""

    params = [2, 3, 4, 8, 16, 32]
    param_names = ["states"]
    repeat = (3, 10, 2.0)

    def setup(self, count):
        core()
        size = SERVING._replace(lengths=(256,))
        *self.states, self.out = states(size, "float32", count + 1)
        self.options = size.options

    def time_merge(self, count):
        rau.merge_states(self.states, out=self.out, backend="cython", **self.options)
