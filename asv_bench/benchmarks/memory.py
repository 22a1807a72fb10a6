"""Memory: no temporary as large as an output."""

import resource
import sys

from .common import BACKENDS, MEDIUM, EachBackend, states, update

_ATTN_BYTES = MEDIUM.tokens * MEDIUM.heads * MEDIUM.head_dim * 4


def _high_water():
    """Most bytes that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Memory(EachBackend):
    """The whole process; without a call it is what the arrays and the imports take."""

    params = [BACKENDS, ["no call", "out="]]
    param_names = ["backend", "how"]

    def setup(self, missing, backend, how):
        self.backend = self.load(missing, backend, how)
        self.arrays = states(MEDIUM, "float32")

    def peakmem_update(self, missing, backend, how):
        if how != "no call":
            update(self.backend, how, MEDIUM, self.arrays)


class Temporaries(EachBackend):
    """What one call takes beyond its arrays, in outputs: near 0 where none of their size is made."""

    params = [BACKENDS]
    param_names = ["backend"]
    unit = "outputs"

    def setup(self, missing, backend):
        self.backend = self.load(missing, backend, "out=")
        devices = self.backend.capabilities.devices
        self.on_gpu = devices == ("cuda",)
        if not self.on_gpu and devices is not None and "cpu" not in devices:
            raise NotImplementedError(f"nobody says here how much memory is used on {', '.join(devices)}")
        small = MEDIUM._replace(lengths=(16,))
        update(self.backend, "out=", small, states(small, "float32"))  # loads what is loaded at first use
        self.arrays = states(MEDIUM, "float32")

    def track_temporaries(self, missing, backend):
        if not self.on_gpu:
            before = _high_water()
            update(self.backend, "out=", MEDIUM, self.arrays)
            return (_high_water() - before) / _ATTN_BYTES
        import torch

        call = update(self.backend, "out=", MEDIUM, self.arrays)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / _ATTN_BYTES
