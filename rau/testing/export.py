"""Conformance as data: cases in plain files, for kernels that Python cannot call, and a judge of their answers.

The rule of this room: a folder explains itself. What is written can be read with just a .npy reader and a JSON parser, and
bounds are computed afresh before they judge, so that a changed file is noticed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rau.arrays.numpy_ import named_dtype
from rau.backends.numpy_ import NumPyBackend
from rau.errors import RauError
from rau.layouts import FIELDS, LAYOUTS
from rau.state import AttentionState
from rau.testing.cases import Case
from rau.testing.comparison import Comparison, compare
from rau.testing.conformance.report import Failure, Report
from rau.testing.precedence import as_text
from rau.testing.reference.oracle import Expected, oracle

INDEX, HOW_TO = "cases.json", "README.txt"
_FORMAT = 1
_AGREE = 1e-9  # of stored bounds with fresh ones: another machine's NumPy may add in another order

_TEXT = """\
Conformance cases for ring_attention_update: merging partial attention states
==============================================================================

What to do. cases.json lists the cases. For each one read the inputs, merge them, and write the files named under
"write" into the case's folder. Then run:  python -m rau cases --verify THIS_FOLDER

Files. All are NumPy .npy files: little-endian, C order, never pickled. bfloat16 is stored as its bits, in uint16.

  in.K.attn_out.npy, in.K.softmax_max.npy, in.K.softmax_sum.npy    input state K = 0, 1, ...
  in.actual_seq_qlen.npy               int64: 0, then where each sequence ends; layout TND only
  out.attn_out.npy and so on           for you to write, with the dtypes and shapes that cases.json gives
  expected.attn_out.npy, ...           the exact result, rounded to float64 only
  bound.attn_out.npy, ...              float64: largest error allowed, element by element
  rau.attn_out.npy, ...                what rau itself returns, in the output's dtype

Arithmetic, for each row, that is each token and head. A state is empty when its sum is 0 or its max is -inf; the
others are live. Only live states count:

  m = max of the m_i        a_i = l_i * exp(m_i - m)        l = sum of the a_i        o = sum of o_i * (a_i / l)

and m is softmax_max, l softmax_sum, o attn_out. In this order of precedence:

RULES

A negative sum takes the formula, whatever that gives. exp(x) may be 0 below x = -708.

Verdict. An output is right within its bound; bound 0 means bit for bit (any NaN for NaN), bound inf means that any
value will do. softmax_max must be equal; zeros of either sign count as equal.

Layouts. S, B, T: sequence length, batch, all tokens; N, D: heads, head dimension.

  SBH   attn_out (S, B, N*D)      statistics (B, N, S, lanes)
  BSND  attn_out (B, S, N, D)     statistics (B, N, S, lanes)
  BNSD  attn_out (B, N, S, D)     statistics (B, N, S, lanes)
  TND   attn_out (T, N, D)        statistics (T, N, lanes), in one of two orders, "softmax_layout":
        "TND" token-major: those of token t, head n are at [t, n];
        "SBH" packed: sequence i, with tokens t0 to t1, owns the rows t0*N to t1*N of the flattened (T*N, lanes)
        array, laid out as (N, t1 - t0).

Lanes. The last axis of the statistics holds one number, 8 times or once. Read lane 0; write all of them.
""".replace("RULES", as_text())


class ExportError(RauError, ValueError):
    """A folder that cannot be written to, or that holds no exported cases."""


class Verification(NamedTuple):
    """What :func:`verify_outputs` found."""

    report: Report  # cases that are right, and those that are wrong or missing
    comparisons: dict[str, Comparison]  # by case, where there was something to compare
    missing: int  # how many cases lack an output


def export_cases(
    folder: str | PathLike[str], cases: Iterable[Case], *, progress: Callable[[str], None] | None = None
) -> list[Failure]:
    """Write cases as data.

    Parameters
    ----------
    folder : path
        A new or an empty folder.
    cases : iterable of Case
    progress : callable, optional
        Called with the id of each case.

    Returns
    -------
    list of Failure
        Cases that were left out, with the reasons.

    Raises
    ------
    ExportError
        If the folder already holds something: answers to older cases could be taken for new ones.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        used = any(folder.iterdir())
    except OSError as error:
        raise ExportError(f"{folder}: {error}") from error
    if used:
        raise ExportError(f"{folder} is not empty; give a new folder, so that old outputs are not taken for new ones")
    (folder / HOW_TO).write_text(_TEXT, encoding="ascii")
    described, left_out = [], []
    for case in cases:
        if progress is not None:
            progress(case.id)
        reason = _reason_against(case)
        if reason:
            left_out.append(Failure(case.id, reason))
        else:
            described.append(_export(folder, case))
    index = {"format": _FORMAT, "how_to": HOW_TO, "cases": described}
    text = json.dumps(index, indent=1)
    text = re.sub(r"\[\s+([\d,\s]+?)\s+\]", lambda shape: f"[{' '.join(shape[1].split())}]", text)  # on one line
    (folder / INDEX).write_text(text + "\n", encoding="ascii")
    return left_out


def verify_outputs(
    folder: str | PathLike[str], *, tolerance: float = 1.0, progress: Callable[[str, int, int], None] | None = None
) -> Verification:
    """Judge the outputs that a program wrote beside exported cases.

    Parameters
    ----------
    folder : path
    tolerance : float, default 1.0
        How many times the bound still counts as right.
    progress : callable, optional
        Called with (id, how many cases are done, how many there are) before each case.

    Returns
    -------
    Verification

    Raises
    ------
    ExportError
        If the folder holds no exported cases, or cases in the format of another version.
    ImportError
        If there are bfloat16 cases, and ml_dtypes is not installed.
    """
    folder = Path(folder)
    index = _read_index(folder)
    found = Verification(Report(str(folder)), {}, 0)
    missing = 0
    for done, entry in enumerate(index):
        if progress is not None:
            progress(entry["id"], done, len(index))
        absent = [spec["file"] for spec in entry["write"].values() if not (folder / spec["file"]).is_file()]
        if absent:
            missing += 1
            found.report.record(entry["id"], [f"missing: {', '.join(absent)}"])
            continue
        try:
            comparison, problems = _judge(folder, entry, tolerance)
        except (OSError, ValueError) as error:
            found.report.record(entry["id"], [str(error)])
            continue
        if comparison is not None:
            found.comparisons[entry["id"]] = comparison
        found.report.record(entry["id"], problems)
    return found._replace(missing=missing)


def _reason_against(case: Case) -> str:
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", case.id):
        return "its id cannot be used as a folder name"
    placements = {case.attn_placement, case.stats_placement, case.out_placement}
    if placements != {"contiguous"} and not case.id.startswith("generated/"):
        return "it is about places in memory, which files do not record"
    try:
        named_dtype(case.dtype), named_dtype(case.cur_dtype or case.dtype)
    except ImportError as error:
        return str(error)
    return ""


def _export(folder: Path, case: Case) -> dict[str, Any]:
    """Write one case; return its description."""
    places = ("attn_placement", "stats_placement", "out_placement")
    plain: dict[str, Any] = {"out": "fresh", "read_only": False, **dict.fromkeys(places, "contiguous")}
    case = replace(case, qlen="none" if case.qlen == "none" else "array", **plain)
    call = case.make()
    expected = _expected(case, call.states)
    result = call.run(NumPyBackend())
    (folder / case.id).mkdir(parents=True)

    def write(name: str, array: np.ndarray) -> dict[str, Any]:
        file = f"{case.id}/{name}.npy"
        return _save(folder / file, array) | {"file": file}

    states = [
        {name: write(f"in.{k}.{name}", part) for name, part in zip(FIELDS, state, strict=True)}
        for k, state in enumerate(call.states)
    ]
    lengths = case.lengths_argument()
    exact = (expected.attn_out, expected.softmax_max, expected.softmax_sum)
    bounds = {"attn_out": expected.attn_bound, "softmax_sum": expected.sum_bound}
    ours = {name: write(f"rau.{name}", part) for name, part in zip(FIELDS, result, strict=True)}
    return {
        "id": case.id,
        "layout": case.layout,
        "softmax_layout": case.softmax_layout,
        "dtype": case.dtype,
        "B": case.batch if case.layout != "TND" else len(case.lengths),
        "S" if case.layout != "TND" else "T": case.tokens,
        "N": case.heads,
        "D": case.head_dim,
        "lanes": case.lanes,
        "states": states,
        "actual_seq_qlen": None if lengths is None else write("in.actual_seq_qlen", lengths),
        "write": {name: {**spec, "file": f"{case.id}/out.{name}.npy"} for name, spec in ours.items()},
        "expected": {name: write(f"expected.{name}", part) for name, part in zip(FIELDS, exact, strict=True)},
        "bound": {name: write(f"bound.{name}", part) for name, part in bounds.items()},
        "rau": ours,
        "numbers": {name: asdict(case)[name] for name in ("statistics", "outputs")},
    }


def _expected(case: Case, states: Sequence[AttentionState]) -> Expected:
    return oracle(states, case.lengths_argument(), case.layout, softmax_layout=case.softmax_layout)


def _save(path: Path, array: np.ndarray) -> dict[str, Any]:
    """Write an array; describe its dtype, how that is stored, and its shape."""
    dtype = array.dtype.name
    stored = array.view(np.uint16) if dtype == "bfloat16" else array
    stored = np.ascontiguousarray(stored, stored.dtype.newbyteorder("<"))
    np.save(path, stored, allow_pickle=False)
    return {"dtype": dtype, "stored_as": stored.dtype.name, "shape": list(array.shape)}


def _read_index(folder: Path) -> list[dict[str, Any]]:
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{folder} holds no exported cases: {error}") from error
    if not isinstance(index, dict) or index.get("format") != _FORMAT:
        raise ExportError(f"{folder / INDEX} is not in format {_FORMAT}, the one that this version reads")
    cases = index.get("cases")
    if not isinstance(cases, list):
        raise ExportError(f'{folder / INDEX}: "cases" is no list')
    for number, entry in enumerate(cases):
        if fault := _entry_fault(folder, entry):
            raise ExportError(f"{folder / INDEX}: case {number} is not as it was exported: {fault}")
    return cases


def _entry_fault(folder: Path, entry: Any) -> str:
    """Say what is wrong with the description of a case; empty where nothing is."""
    keys = {"id", "layout", "softmax_layout", "states", "actual_seq_qlen", "write", "bound"}
    if not isinstance(entry, dict) or keys - entry.keys():
        return f"it lacks some of {', '.join(sorted(keys))}"
    if not all(isinstance(entry[name], str) for name in ("id", "layout", "softmax_layout")):
        return "its id, layout or softmax_layout is no word"
    if entry["layout"] not in LAYOUTS or entry["softmax_layout"] not in ("TND", "SBH"):
        return f"its layout is {entry['layout']!r} and its softmax_layout {entry['softmax_layout']!r}, which do not exist"
    states, lengths = entry["states"], entry["actual_seq_qlen"]
    if not isinstance(states, list) or not states:
        return "it has no states"
    groups = [(FIELDS, state) for state in states] + [(FIELDS, entry["write"]), (("attn_out", "softmax_sum"), entry["bound"])]
    specs = [] if lengths is None else [lengths]
    for names, group in groups:
        if not isinstance(group, dict) or set(names) - group.keys():
            return f"an array of {', '.join(names)} is not described"
        specs += [group[name] for name in names]
    root = folder.resolve()
    for spec in specs:
        words = isinstance(spec, dict) and all(isinstance(spec.get(name), str) for name in ("file", "dtype", "stored_as"))
        shape = spec.get("shape") if words else None
        if not isinstance(shape, list) or not all(type(length) is int for length in shape):
            return "a file, its dtype or its shape is not described"
        if not (folder / spec["file"]).resolve().is_relative_to(root):
            return f"{spec['file']} is not in the folder"
    return ""


def _judge(folder: Path, entry: dict[str, Any], tolerance: float) -> tuple[Comparison | None, list[str]]:
    """Judge the outputs of one case."""
    states = [AttentionState(*(_load(folder, state[name]) for name in FIELDS)) for state in entry["states"]]
    spec = entry["actual_seq_qlen"]
    lengths = None if spec is None else _load(folder, spec)
    expected = oracle(states, lengths, entry["layout"], softmax_layout=entry["softmax_layout"])
    fresh = {"attn_out": expected.attn_bound, "softmax_sum": expected.sum_bound}
    for name, spec in entry["bound"].items():
        stored = _load(folder, spec)
        if stored.shape != fresh[name].shape or not np.allclose(stored, fresh[name], _AGREE, 0.0, equal_nan=True):
            said = f"{spec['file']} is not the bound of these inputs: a file was changed, or another version wrote it"
            return None, [said]
    problems: list[str] = []
    outputs = [_load(folder, entry["write"][name], problems) for name in FIELDS]
    if problems:
        return None, problems
    comparison = compare(outputs, expected, tolerance=tolerance)
    return comparison, list(comparison.problems)


def _load(folder: Path, spec: dict[str, Any], problems: list[str] | None = None) -> np.ndarray:
    """Read an array as it is described; where it differs, raise ValueError, or note the problem."""
    try:
        if not (folder / spec["file"]).is_file():  # a pipe would be waited for
            raise ValueError("no file")
        array = np.load(folder / spec["file"], allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("several arrays")
    except Exception as error:  # of NumPy's, zipfile's, tokenize's own: whoever wrote the file chooses
        raise ValueError(f"{spec['file']} is not a .npy file that can be read without pickle: {error}") from error
    if spec["dtype"] == "bfloat16" and array.dtype == np.dtype("V2"):  # as NumPy saves ml_dtypes' bfloat16
        array = array.view(np.uint16)
    wrong = []
    if array.dtype.name != spec["stored_as"]:
        kind = spec["dtype"] if spec["stored_as"] == spec["dtype"] else f"{spec['stored_as']}, the bits of {spec['dtype']}"
        wrong.append(f"{spec['file']} has dtype {array.dtype.name}; expected {kind}")
    if list(array.shape) != spec["shape"]:
        wrong.append(f"{spec['file']} has shape {array.shape}; expected {tuple(spec['shape'])}")
    if wrong and problems is None:
        raise ValueError("; ".join(wrong))
    if problems is not None:
        problems += wrong
    if wrong:
        return np.asarray(array)
    native = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    return native.view(named_dtype(spec["dtype"])) if spec["dtype"] == "bfloat16" else native
