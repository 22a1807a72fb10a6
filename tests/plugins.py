"""Distributions with entry points, faked: a folder with a module and its ``*.dist-info``."""

LOOPBACK = '''
import numpy as np

import rau
from rau.backends import AttentionState, Backend, Capabilities

made = 0


class Array:
    """An array of its own kind: not NumPy's, nor derived from it."""

    def __init__(self, values, device="cpu"):
        self.values, self.device = np.ascontiguousarray(values), device

    shape = property(lambda self: self.values.shape)
    dtype = property(lambda self: self.values.dtype)


class LoopbackBackend(Backend):
    name = "loopback"
    capabilities = Capabilities(array_types=("rau_loopback:Array",), devices=("cpu", "loop"))

    def __init__(self):
        global made
        made += 1

    def update(self, problem, prev, cur, out):
        result = rau.ring_attention_update(
            *(part.values for part in (*prev, *cur)),
            problem.actual_seq_qlen,
            problem.layout,
            softmax_layout=problem.softmax_layout,
            out=None if out is None else [part.values for part in out],
            backend="numpy",
            profile="portable",
        )
        return out or AttentionState(*map(Array, result))

    def asarray(self, array):
        return Array(array)

    def to_numpy(self, array):
        return array.values
'''


def install(folder, distribution, points, **modules):
    """Write a distribution.

    Parameters
    ----------
    folder : Path
        To be on sys.path.
    distribution : str
        Its name.
    points : dict or str
        Entry points of the group rau.backends: name to "module:attribute"; or the whole text of entry_points.txt.
    **modules : str
        The text of each module.
    """
    info = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    if not isinstance(points, str):
        points = "[rau.backends]\n" + "".join(f"{name} = {where}\n" for name, where in points.items())
    (info / "entry_points.txt").write_text(points)
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
