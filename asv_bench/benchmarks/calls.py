"""What a call costs beside its bytes, and what importing rau costs."""

import rau
from rau.cli.bench.workload import SMALLEST

from .common import core, states


class SmallestCall:
    """16 tokens, 8 heads of 64: all default checks, the backend chosen anew each time."""

    params = [["NumPy", "torch"], ["out=", "fresh"]]
    param_names = ["arrays", "how"]

    def setup(self, arrays, how):
        core()
        made = states(SMALLEST, "float32")
        if arrays == "torch":
            try:
                import torch
            except ImportError as error:
                raise NotImplementedError("torch is not installed") from error
            made = [rau.AttentionState(*map(torch.from_numpy, state)) for state in made]
        prev, cur, out = made
        self.inputs, self.out = (*prev, *cur), out if how == "out=" else None

    def time_update(self, arrays, how):
        rau.ring_attention_update(*self.inputs, out=self.out)


class Import:
    """Beyond NumPy, in a fresh interpreter."""

    number = 1
    env = {"PYTHONDONTWRITEBYTECODE": ""}  # an installed package has its bytecode; a checkout gets it at the first import

    def timeraw_import(self):
        return "import rau", "import numpy"
