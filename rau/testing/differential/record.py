"""A call in a file: inputs, what was observed, and how to make the call again. NumPy's .npz, never pickled.

The keys, all optional but the arrays of at least one state:

====================================  =====================================================================
``states.K.attn_out`` and so on       the arrays of input state K, also ``.softmax_max``, ``.softmax_sum``;
                                      ``prev_attn_out``, ``cur_attn_out`` and so on mean states 0 and 1
``attn_out``, ``softmax_max``,        what some implementation returned for them
``softmax_sum``
``actual_seq_qlen``                   cumulative sequence lengths
``layout``, ``softmax_layout``        strings; "SBH" and "TND" by default
``lse_base``                          "e" or "2", where it keeps a log-sum-exp: by that it is judged
``states.K.lse`` and so on, ``lse``   in place of maximum and sum: log-sum-exps to that base, with the axes of the statistics
``unpromised``                        names from `rau.backends.PROPERTIES`, to which it is not held; absent: to everything
``case``                              JSON of a `rau.testing.cases.Case`: how the arrays lay in memory
====================================  =====================================================================

bfloat16 has no place in the .npy format: it is stored as uint16 (in an integer dtype or as NumPy's void ``V2``).

Or a file of torch.save, with a dict of the same keys: it is loaded as weights only, and a state may then be one value, an
AttentionState or a tuple of three tensors, under ``prev``, ``cur`` and ``out``. Of what was observed, parts may be missing.
"""

from __future__ import annotations

import difflib
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rau.arrays import kind_of
from rau.arrays.numpy_ import named_dtype
from rau.backends import PROPERTIES, Backend, Capabilities
from rau.constraints.hints import described, meant
from rau.constraints.lengths import bind_lengths
from rau.constraints.profiles import PROFILES
from rau.constraints.rules import Violations
from rau.errors import RauError, shown
from rau.install import command
from rau.layouts import FIELDS, LAYOUTS, OTHER_LAYOUTS
from rau.lse import statistics
from rau.problem import Problem
from rau.state import AttentionState
from rau.testing.cases import Case
from rau.testing.cases.placements import OUT_PLACEMENTS, PLACEMENTS


class Record(NamedTuple):
    """What a file holds."""

    case: Case
    states: list[AttentionState]  # the inputs, C-contiguous; ``case.make(states)`` lays them out as they were
    observed: AttentionState | None  # what some implementation returned; None in the place of what is not there
    lse_base: str = ""  # "e" or "2" where it keeps a log-sum-exp
    unpromised: tuple[str, ...] = ()  # what it does not promise, of PROPERTIES
    unread: tuple[str, ...] = ()  # keys that mean nothing here


class RecordError(RauError, ValueError):
    """A file that is no record of a call."""


class Recorded(Backend):
    """What was recorded, as a backend: asked for that call, it gives back that output, right or wrong."""

    name = "the recorded output"
    capabilities = Capabilities(array_types=("numpy:ndarray",))

    def __init__(self, observed: AttentionState, lse_base: str = "", unpromised: tuple[str, ...] = ()) -> None:
        self.observed = observed
        kept = "lse" if lse_base else "max_sum"
        kind = replace(self.capabilities, statistics=kept, lse_base=lse_base or "e", unpromised=unpromised)
        vars(self)["capabilities"] = kind

    def update(
        self, problem: Problem, prev: AttentionState, cur: AttentionState, out: AttentionState | None
    ) -> AttentionState:
        """Return the recorded arrays, or fill `out` with them, as far as they fit."""
        return self.merge(problem, (prev, cur), out)

    def merge(self, problem: Problem, states: Sequence[AttentionState], out: AttentionState | None) -> AttentionState:
        """The same, whatever the states."""
        alike = [(mine.shape, mine.dtype) for mine in self.observed]
        if out is None or alike != [(its.shape, its.dtype) for its in out]:
            return self.observed
        for its, mine in zip(out, self.observed, strict=True):
            its[...] = mine
        return out


def write_record(
    path: str | PathLike[str],
    case: Case,
    states: Sequence[Any],
    observed: Sequence[Any] | None = None,
    lse_base: str = "",
    unpromised: tuple[str, ...] = (),
) -> None:
    """Write a call to a file .npz: its inputs, as they were before it, and what was observed, of what kind of kernel."""
    arrays = {f"states.{k}.{name}": part for k, state in enumerate(states) for name, part in zip(FIELDS, state, strict=True)}
    if observed is not None:
        arrays.update(zip(FIELDS, observed, strict=True))
    stored = {name: _storable(np.asarray(array)) for name, array in arrays.items()}
    lengths = case.lengths_argument()
    if lengths is not None:
        stored["actual_seq_qlen"] = np.asarray(lengths)
    stored |= {"layout": np.array(case.layout), "softmax_layout": np.array(case.softmax_layout)}
    stored |= {"lse_base": np.array(lse_base)} if lse_base else {}
    stored |= {"unpromised": np.array(unpromised)} if unpromised else {}
    stored["case"] = np.array(json.dumps(asdict(case)))
    np.savez(path, allow_pickle=False, **stored)


def read_record(path: str | PathLike[str]) -> Record:
    """Read a call from a file, written by :func:`write_record` or by anybody who keeps to the keys.

    RecordError if the file is none or its parts do not fit together, ConstraintError if its cumulative lengths are none.
    """
    if not Path(path).exists():
        here = Path(path).absolute().parent
        others = [other.name for other in here.glob("*")] if here.is_dir() else []
        close = difflib.get_close_matches(Path(path).name, others, n=1, cutoff=0.8)
        raise RecordError(f"{path}: no such file in {here}{f'; did you mean {close[0]}?' if close else ''}")
    if not Path(path).is_file():  # a pipe would be waited for
        raise RecordError(f"{path}: {'a folder' if Path(path).is_dir() else 'no file'}; expected a file")
    try:
        with zipfile.ZipFile(path) as archive:  # NumPy takes other files too
            torchs = any(name.endswith("/data.pkl") for name in archive.namelist())
        arrays = _of_torch(path) if torchs else _of_numpy(path)
    except RecordError:
        raise
    except OSError as error:
        raise RecordError(f"{path}: cannot be read: {error.strerror or error}") from error
    except zipfile.BadZipFile as error:
        told = "no whole .npz file, and none of torch.save; python -m rau diagnose --help says what is read"
        raise RecordError(f"{path}: {told}") from error
    except Exception as error:  # of zipfile's, NumPy's, tokenize's and ast's own: whoever wrote the file chooses
        raise RecordError(f"{path}: not a .npz file that can be read without pickle: {error}") from error
    spelt: dict[str, str] = {}  # how the file begins the keys of a state, where it has names of its own for it
    for side, k in (("prev", 0), ("cur", 1)):
        for name in (*FIELDS, "lse"):
            if f"{side}_{name}" in arrays:
                arrays[f"states.{k}.{name}"] = arrays.pop(f"{side}_{name}")
                spelt[f"states.{k}."] = f"{side}_"
    words, lse_base = _text(arrays, "case", ""), _text(arrays, "lse_base", "")
    if lse_base not in ("", "e", "2") or (not lse_base and any(name.rpartition(".")[2] == "lse" for name in arrays)):
        raise RecordError(f'{path}: a log-sum-exp to base {lse_base!r}; expected lse_base, "e" or "2"')
    unpromised = tuple(map(str, np.ravel(arrays.get("unpromised", ())).tolist()))
    if unknown := [name for name in unpromised if name not in PROPERTIES]:
        raise RecordError(f"{path}: unpromised names {shown(unknown[0])}; expected some of {', '.join(PROPERTIES)}")
    count = 0
    while f"states.{count}.attn_out" in arrays:
        count += 1
    if not count:
        raise RecordError(f'{path}: no input states; expected keys such as "prev_attn_out" or "states.0.attn_out"')
    states = [_state(path, arrays, f"states.{k}.", spelt=spelt) for k in range(count)]
    observed = None
    if any(name in arrays for name in (*FIELDS, "lse")):
        observed = _state(path, arrays, "", complete=False)
    own = {f"states.{k}.{name}" for k in range(count) for name in (*FIELDS, "lse")}
    known = {*own, *FIELDS, "lse", "actual_seq_qlen", "layout", "softmax_layout", "lse_base", "unpromised", "case"}
    unread = tuple(sorted(arrays.keys() - known))
    case = _described_case(path, words, states, arrays) if words else _describe(path, states, arrays)
    return Record(case, states[:1] if case.aliased else states, observed, lse_base, unpromised, unread)


def _of_numpy(path: Any) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: np.asarray(file[name]) for name in file.files}
    for name, array in arrays.items():
        if array.dtype.kind == "S":  # a member that is no .npy comes as its bytes
            raise ValueError(f"{name} is no array")
    return arrays


def _of_torch(path: Any) -> dict[str, np.ndarray]:
    """Read a file of torch.save, as weights only."""
    try:
        import torch
    except ImportError as error:
        raise RecordError(f"{path}: torch wrote it, and is needed to read it: {command('torch')}") from error
    try:
        with torch.serialization.safe_globals([AttentionState]):
            given = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        found = re.search(r"GLOBAL (\S+)", str(error))  # a class or function that it would have to trust
        holds = f", since it holds {found[1]}" if found else ""
        raise RecordError(f"{path}: torch does not read it as weights only{holds}; expected a dict of tensors and words") from error
    if not isinstance(given, dict):
        raise RecordError(f"{path}: holds {described(given)}; expected a dict of tensors, with keys such as prev_attn_out")
    flat: dict[str, Any] = {}
    for key, value in given.items():
        if key in ("prev", "cur", "out") and isinstance(value, (tuple, list)) and len(value) == 3:
            side = "" if key == "out" else f"{key}_"
            flat |= {f"{side}{name}": part for name, part in zip(FIELDS, value, strict=True)}
        else:
            flat[str(key)] = value
    return {name: _array(value) for name, value in flat.items()}


def _array(value: Any) -> np.ndarray:
    """Make an array of what torch holds: of bfloat16 by its bits."""
    kind = kind_of(value)
    if kind is None or kind.name != "torch":
        return np.asarray(value)
    value = value.detach().contiguous()
    return kind.host_view(value)


# What the words of a case may be, beyond what the arrays tell.
_WORDS = {
    "profile": PROFILES, "qlen": ("array", "int32", "list", "none"), "out": ("fresh", "given", "prev", "cur"),
    "attn_placement": PLACEMENTS, "stats_placement": PLACEMENTS, "out_placement": OUT_PLACEMENTS,
    **dict.fromkeys(("read_only", "aliased", "unequal_lanes"), (False, True)),
}  # fmt: skip


def _described_case(path: Any, told_in: str, states: list[AttentionState], arrays: dict[str, np.ndarray]) -> Case:
    """Read the description of a case, and hold it against the arrays beside it."""
    try:
        words = json.loads(told_in)
        case = Case(**words | {"lengths": tuple(words.get("lengths", ()))})
        if not all(isinstance(word, str) for word in (case.id, case.statistics, case.outputs)):
            raise TypeError("id, statistics and outputs are words")
        wrong = [name for name, known in _WORDS.items() if getattr(case, name) not in known]
        if wrong:
            raise ValueError(f"{wrong[0]} is {getattr(case, wrong[0])!r}; expected one of {', '.join(map(str, _WORDS[wrong[0]]))}")
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise RecordError(f'{path}: "case" does not describe a case: {error}') from error
    arrays = arrays | {"layout": np.array(case.layout), "softmax_layout": np.array(case.softmax_layout)}
    seen = _describe(path, states, arrays)
    for name in ("layout", "softmax_layout", "batch", "tokens", "heads", "head_dim", "lengths", "lanes", "dtype", "states"):
        told, found = getattr(case, name), getattr(seen, name)
        ignored = name == "batch" if case.layout == "TND" else name == "lengths"  # a case makes no use of it then
        ignored = ignored or (name == "lengths" and case.qlen == "none")
        if told != found and not ignored and not (name == "states" and case.aliased and found == 1):
            raise RecordError(f'{path}: "case" says that {name} is {told!r}, and the arrays that it is {found!r}')
    return case


def _storable(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


def _text(arrays: dict[str, np.ndarray], key: str, default: str) -> str:
    return str(arrays[key]) if key in arrays else default


def _state(
    path: Any, arrays: dict[str, np.ndarray], prefix: str, complete: bool = True, spelt: Mapping[str, str] = {}
) -> AttentionState:
    parts: list[Any] = []
    if f"{prefix}lse" in arrays:
        lse, wide = arrays[f"{prefix}lse"], "float64" if arrays.get(f"{prefix}attn_out", np.empty(0)).dtype == "f8" else "float32"
        if lse.dtype.kind != "f" or lse.ndim not in (2, 3):
            raise RecordError(f'{path}: "{prefix}lse" is {lse.dtype.name} of shape {lse.shape}; expected float32 or float64 of the '
                              "axes (B, N, S), or (T, N) in layout TND")  # fmt: skip
        both = map(np.ascontiguousarray, statistics(lse, None, wide, _text(arrays, "lse_base", ""), lanes=8))
        arrays = arrays | dict(zip((prefix + FIELDS[1], prefix + FIELDS[2]), both, strict=True))
    for name in FIELDS:
        if prefix + name not in arrays:
            if not complete:
                parts.append(None)
                continue
            raise RecordError(f'{path}: "{spelt.get(prefix, prefix)}{name}" is missing, but other arrays of its state are there')
        array = arrays[prefix + name]
        if array.dtype in (np.uint16, np.dtype("V2")):
            array = array.view(named_dtype("bfloat16"))
        parts.append(array)
    return AttentionState(*parts)


def _describe(path: Any, states: list[AttentionState], arrays: dict[str, np.ndarray]) -> Case:
    """Work out what call the arrays stand for."""
    layout, order = _text(arrays, "layout", "SBH"), _text(arrays, "softmax_layout", "TND")
    if layout not in LAYOUTS:
        hint = meant(layout, LAYOUTS, OTHER_LAYOUTS)
        raise RecordError(f"{path}: layout {layout!r} is not one of {', '.join(LAYOUTS)}.{hint}")
    attn, stats = states[0].attn_out.shape, states[0].softmax_max.shape
    axes = LAYOUTS[layout]
    if len(attn) != axes.attn.count(",") + 1 or len(stats) != axes.stats.count(",") + 1:
        raise RecordError(f"{path}: shapes {attn} and {stats} do not fit layout {layout!r}, {axes.attn}")
    heads = stats[axes.stats_head]
    cumulative = arrays.get("actual_seq_qlen") if layout == "TND" else None
    lengths: tuple[int, ...] = ()
    if cumulative is not None:  # a case holds lengths, so that what is not cumulative would be lost
        report = Violations(str(path))
        bound = bind_lengths(report, cumulative, attn[0], order == "SBH", False)
        report.raise_if_broken()
        lengths = tuple(np.diff(bound).tolist())
    dtypes = [state.attn_out.dtype.name for state in states]
    return Case(
        id=f"file/{path}", layout=layout, softmax_layout=order,
        batch=1 if axes.attn_batch is None else attn[axes.attn_batch], tokens=attn[axes.attn_token], heads=heads,
        head_dim=attn[-1] if axes.attn_head is not None else attn[-1] // max(heads, 1),
        lengths=lengths, qlen="none" if cumulative is None else "array", lanes=stats[-1], dtype=dtypes[0],
        cur_dtype=dtypes[-1], states=len(states),
    )  # fmt: skip
