"""The plugin contract: what a backend is. This page is all of it.

A backend is one class with a ``name``, class-level ``capabilities``, a constructor without arguments that
acquires its framework or device (and raises with the reason if it cannot), and one required method,
``update``. Its module is cheap to import and imports no framework. It is found through the entry-point
group ``rau.backends``, or passed to :func:`rau.registry.register`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any, ClassVar

import numpy as np

from rau.arrays.numpy_ import ITEMSIZE, NARROW
from rau.arrays.torch_ import has_float64
from rau.constraints.hints import meant
from rau.errors import shown
from rau.layouts import LAYOUTS, OTHER_LAYOUTS
from rau.problem import Problem
from rau.state import AttentionState

__all__ = ["PROPERTIES", "AttentionState", "Backend", "Capabilities", "Problem"]

# What the contract asks beyond ordinary numbers. A kernel that says which of these it does not promise is held to the rest.
PROPERTIES = {
    "one-empty": "a row that is empty on one side comes back as the others have it, not NaN",
    "two-empty": "a row that is empty on all sides comes back empty, not NaN",
    "payload": "NaN or infinity behind an empty side, or behind a weight of 0, is not read",
    "small-weights": "a side of small weight adds a small error, however large its output",
    "infinity": "a statistic of +inf gives NaN; it is not read as an empty side",
    "nan": "NaN in a row's statistics gives NaN",
    "signed-zero": "zeros keep the sign that IEEE arithmetic gives them",
    "subnormal": "numbers below the smallest normal one are not taken for 0",
}


def _told_of_unknown_fields(cls: type[Any]) -> type[Any]:
    """Have a dataclass say which of its fields was meant: more than one may be wrong, and Python names the first."""
    init, known = cls.__init__, [field.name for field in fields(cls)]

    @wraps(init)
    def __init__(self: Any, **given: Any) -> None:
        lines = []
        for name, value in given.items():
            if name not in known:
                import difflib

                close = difflib.get_close_matches(name, known, n=1)
                expected = f'did you mean "{close[0]}"?' if close else f"expected some of {', '.join(known)}."
                lines.append(f"{cls.__name__}: {name} = {shown(value)}: no such field; {expected}")
        if lines:
            raise TypeError("\n".join(lines))
        init(self, **given)

    cls.__init__ = __init__
    return cls


@_told_of_unknown_fields
@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a backend takes, as data: selection, reasons, tables and skips all derive from it.

    Attributes
    ----------
    array_types : tuple of str
        Types it takes, as "module:qualname", compared with the names of an array's type and its bases.
    devices : tuple of str or None
        Kinds of device, such as "cpu" or "cuda"; None means any.
    dtypes : tuple of str
        Dtypes of attn_out.
    mixed : bool
        Whether it merges 16-bit states into a float32 one.
    layouts, softmax_layouts : tuple of str
    lanes : tuple of int
    out : bool
        Whether it writes into arrays that are given to it. Where not, as for a library whose arrays nobody can write into,
        `in_place`, `halves` and `runs` are False, which speak of places in such arrays.
    in_place : bool
        Whether the result may be written over an input.
    halves : bool
        Whether it takes problems with a `half`, as any backend that walks ``problem.blocks`` does. For the others,
        StreamingMerge makes several calls without one.
    runs : bool
        Whether it takes problems with `runs`, as any backend that walks ``problem.blocks`` does. For the others, the rows are
        copied, merged, and copied back.
    float64 : bool
        Whether it computes in torch's float64, which a device then has to have.
    differentiable : bool
    deterministic : bool
        Whether it gives the same bits at every run and for any number of threads.
    max_heads, max_head_dim : int or None
    head_dim_multiple : int
    limits : callable or None
        Given a :class:`Problem`, returns further reasons against it, a list of str, for what the fields above cannot say: a
        limit of only one layout, or one on a product. It looks at sizes and dtypes, never at where the arrays are.
    tolerance : float
        Multiple of the contract's bound that its arithmetic keeps: 1 for that of rau, larger for a kernel
        that computes its rows in float32. Whatever it is, results are rounded to 16 bits as well as any backend's.
    statistics : {"max_sum", "lse"}
        What its kernel keeps of a row: maximum and sum, or their log-sum-exp in float32. The latter is compared as one
        number, and held to a bound of its own, `rau.testing.reference.log_sum_exp`, of which `tolerance` is a multiple.
    lse_base : {"e", "2"}
        Base of that logarithm; no effect with "max_sum".
    unpromised : tuple of str
        Keys of :data:`PROPERTIES` that its kernel does not promise. The conformance kit then asks for the rest, and tells
        apart from that whether the kernel does it all the same.
    max_states : int or None
        Most states that it merges in one call.
    without_statistics : bool
        Whether it merges outputs alone: given a problem whose `statistics` are False, it leaves them out, and puts None in their
        places. Any other writes them to arrays that are dropped.
    contiguous : bool
        Whether its kernel takes contiguous arrays only, as one does that is given nothing but pointers. Others are copied
        before it is called, and the results of a call into others after it; the logger "rau" tells of each such call. `halves`
        and `runs`, which are places within larger arrays, are False then.
    """

    array_types: tuple[str, ...]
    devices: tuple[str, ...] | None = ("cpu",)
    dtypes: tuple[str, ...] = ("float16", "bfloat16", "float32", "float64")
    mixed: bool = True
    layouts: tuple[str, ...] = tuple(LAYOUTS)
    softmax_layouts: tuple[str, ...] = ("TND", "SBH")
    lanes: tuple[int, ...] = (8, 1)
    out: bool = True
    in_place: bool = True
    halves: bool = False
    runs: bool = False
    float64: bool = False
    differentiable: bool = False
    deterministic: bool = True
    max_heads: int | None = None
    max_head_dim: int | None = None
    head_dim_multiple: int = 1
    limits: Callable[[Problem], list[str]] | None = None
    tolerance: float = 1.0
    statistics: str = "max_sum"
    lse_base: str = "e"
    unpromised: tuple[str, ...] = ()
    max_states: int | None = None
    without_statistics: bool = False
    contiguous: bool = False

    def __post_init__(self) -> None:
        wrong: list[tuple[str, str]] = []  # field, what was expected
        for name in ("array_types", "dtypes", "layouts", "softmax_layouts", "devices", "unpromised"):
            value = getattr(self, name)
            words = isinstance(value, tuple) and all(isinstance(word, str) for word in value)
            if not words and not (value is None and name == "devices"):
                one = value if isinstance(value, str) else value[0] if isinstance(value, list) and value else "float32"
                wrong.append((name, f"a tuple of str, such as ({shown(one)},)"))
        if not isinstance(self.lanes, tuple) or not {*map(str, self.lanes)} <= {"8", "1"}:
            wrong.append(("lanes", "a tuple of 8 and 1, such as (8,)"))
        for name, least in (("max_heads", 0), ("max_head_dim", 0), ("head_dim_multiple", 1), ("max_states", 2)):
            value = getattr(self, name)
            if value is None and name != "head_dim_multiple":
                continue
            if not isinstance(value, int) or value < least:
                wrong.append((name, f"an int, at least {least}"))
        if not (self.limits is None or callable(self.limits)):
            wrong.append(("limits", "a callable that takes a Problem and returns a list of str, or None"))
        if not isinstance(self.tolerance, (int, float)) or not 0 < self.tolerance < math.inf:
            wrong.append(("tolerance", "a positive number, such as 2.0"))
        for name in (field.name for field in fields(self) if field.type == "bool"):
            if type(getattr(self, name)) is not bool:
                wrong.append((name, "True or False"))
        for name, choices in (("statistics", ("max_sum", "lse")), ("lse_base", ("e", "2"))):
            if getattr(self, name) not in choices:
                wrong.append((name, " or ".join(map(repr, choices))))
        if isinstance(self.unpromised, tuple) and not {*map(str, self.unpromised)} <= {*PROPERTIES}:
            wrong.append(("unpromised", f"some of {', '.join(PROPERTIES)}"))
        if wrong:
            lines = [f"Capabilities: {name} = {shown(getattr(self, name))}; expected {expected}." for name, expected in wrong]
            raise TypeError("\n".join(lines))
        if self.contiguous:  # of a place within larger arrays there is no contiguous copy that is also the place
            object.__setattr__(self, "halves", False)
            object.__setattr__(self, "runs", False)
        if not self.out:
            for name in ("in_place", "halves", "runs"):
                object.__setattr__(self, name, False)

    def unknown_names(self) -> list[str]:
        """List what is declared and does not exist in this version, which may be an older one than it was written for.

        A call is not refused for it. Whoever tests a backend is told: its author meant something else.

        Returns
        -------
        list of str
            A line for each name: the field, what it holds, what was expected.
        """
        lines = []
        for name, known in (("dtypes", ITEMSIZE), ("layouts", LAYOUTS), ("softmax_layouts", ("TND", "SBH")), ("lanes", (8, 1))):
            declared = getattr(self, name)
            if not declared:
                lines.append(f"Capabilities: {name} = (); expected at least one of {', '.join(map(str, known))}.")
            for word in declared:
                if word not in known:
                    hint = meant(word, LAYOUTS, OTHER_LAYOUTS) if name == "layouts" else ""
                    told = f"Capabilities: {name} = {shown(declared)} names {shown(word)}"
                    lines.append(f"{told}; expected some of {', '.join(map(str, known))}.{hint}")
        lines += [
            f'Capabilities: array_types = {shown(self.array_types)} names {shown(word)}; expected "module:qualname", such as '
            '"numpy:ndarray".'
            for word in self.array_types
            if not all(word.partition(":")[::2])
        ]
        return lines

    def limits_broken(self, problem: Problem) -> list[str]:
        """Reasons against a problem that do not depend on where its arrays are.

        Parameters
        ----------
        problem : Problem

        Returns
        -------
        list of str
            Each with the computed value and the limit; empty if the backend takes the problem.
        """
        reasons = []
        if problem.dtype not in self.dtypes:
            reasons.append(f"dtype {problem.dtype} is not one of {', '.join(self.dtypes)}")
        if problem.cur_dtype != problem.dtype and not self.mixed:
            reasons.append(f"it does not merge {problem.cur_dtype} into {problem.dtype}")
        if problem.layout not in self.layouts:
            reasons.append(f"layout {problem.layout} is not one of {', '.join(self.layouts)}")
        if problem.layout == "TND" and problem.softmax_layout not in self.softmax_layouts:
            reasons.append(f"softmax_layout {problem.softmax_layout} is not one of {', '.join(self.softmax_layouts)}")
        if problem.lanes not in self.lanes:
            more = ": AttentionState.from_lse(..., lanes=8) makes 8" if problem.lanes == 1 else ""
            reasons.append(f"the number of lanes is {problem.lanes}, not {' or '.join(map(str, self.lanes))}{more}")
        if problem.out and not self.out:
            reasons.append("it does not write into arrays that are given: leave out=None")
        elif problem.in_place and not self.in_place:
            reasons.append("it does not write over its inputs")
        if problem.half is not None and not self.halves:
            reasons.append("it does not take halves of sequences")
        if problem.runs is not None and not self.runs:
            reasons.append("it does not take runs of tokens")
        if self.max_heads is not None and problem.N > self.max_heads:
            reasons.append(f"N = {problem.N} > {self.max_heads}")
        if self.max_head_dim is not None and problem.D > self.max_head_dim:
            reasons.append(f"D = {problem.D} > {self.max_head_dim}")
        if self.max_states is not None and problem.K > self.max_states:
            reasons.append(f"K = {problem.K} > {self.max_states} states")
        if problem.D % self.head_dim_multiple:
            reasons.append(f"D = {problem.D} is not a multiple of {self.head_dim_multiple}")
        return reasons + self._own_limits(problem)

    def _own_limits(self, problem: Problem) -> list[str]:
        """What `limits` says; where it goes wrong itself, that is a reason, and no matter of the caller's."""
        if self.limits is None:
            return []
        try:
            found = list(self.limits(problem))
        except Exception as error:
            return [f"its limits cannot be asked ({type(error).__name__}: {shown(error)})"]
        return [reason if isinstance(reason, str) else f"its limits say {shown(reason)}" for reason in found]

    def running_dtype(self, dtype: str) -> str:
        """Name the dtype in which a chain of updates keeps its running output: 16 bits would be rounded at every step.

        Parameters
        ----------
        dtype : str
            Dtype of the first state's output.

        Returns
        -------
        str
            "float32" for what is narrower, if that is one of `dtypes`; otherwise `dtype`.
        """
        return "float32" if dtype in NARROW and "float32" in self.dtypes else dtype

    def arrays_refused(self, problem: Problem) -> list[str]:
        """Reasons against the arrays of a problem: their type and device.

        Parameters
        ----------
        problem : Problem

        Returns
        -------
        list of str
        """
        reasons = []
        for name in problem.array_types:
            if name in self.array_types:
                break
        else:
            reasons.append(f"{problem.array_types[0]} is not one of {', '.join(self.array_types)}")
        if self.devices is not None and problem.device.partition(":")[0] not in self.devices:
            reasons.append(f"device {problem.device} is not one of {', '.join(self.devices)}")
        if self.float64 and problem.kind == "torch":
            if not has_float64(problem.device):
                reasons.append(f"device {problem.device} has no float64, in which it computes rows: pass .cpu() of each tensor")
        return reasons


class Backend:
    """Base class of the backends; third parties may derive from it or only look like it."""

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]

    def update(
        self, problem: Problem, prev: AttentionState, cur: AttentionState, out: AttentionState | None
    ) -> AttentionState:
        """Merge two states.

        Parameters
        ----------
        problem : Problem
            Already validated: nothing needs to be checked again.
        prev, cur : AttentionState
            The arrays, of the types in `capabilities`.
        out : AttentionState or None
            Arrays to fill, those of `prev` or `cur` themselves where the call is in place; None means to allocate. Torch has
            been told that its tensors will be written. Where ``problem.statistics`` is False, which only a backend meets that
            declares `without_statistics`, attn_out alone is wanted, and None stands for the statistics, here and in the result.

        Returns
        -------
        AttentionState
            The arrays that were filled.
        """
        raise NotImplementedError(f"{type(self).__name__} has no update")

    def merge(self, problem: Problem, states: Sequence[AttentionState], out: AttentionState | None) -> AttentionState:
        """Merge K states; by default one update after another.

        Parameters
        ----------
        problem : Problem
        states : sequence of AttentionState
        out : AttentionState or None

        Returns
        -------
        AttentionState

        Notes
        -----
        Each update rounds a weight, a product, a sum and the row's sum that it stores, so that an element may be four times
        as far off as the bound of one merge of all states allows; and that bound does not cover a weight that vanishes in
        two steps though it is large enough in one, or a sum that overflows on the way. 16 bits are rounded once: a running
        float32 state goes through `to_numpy`.
        """
        if len(states) == 2:
            return self.update(problem, states[0], states[1], out)
        running, wide = states[0], self.capabilities.running_dtype(problem.dtype)
        if wide != problem.dtype:
            running = self._cast(running, wide)
        # With a single state: merged with the neutral element, it comes back as it is.
        for cur in states[1:] or [self._neutral(problem, running)]:
            if wide != problem.dtype and not self.capabilities.mixed:
                cur = self._cast(cur, wide)
            running = self._step(problem, running, cur, None)
        if wide != problem.dtype:
            running = self._cast(running, problem.dtype)
        if out is not None:
            return self._into(problem, running, out)
        return running if problem.statistics else AttentionState(running.attn_out, None, None)

    def _step(
        self, problem: Problem, prev: AttentionState, cur: AttentionState, out: AttentionState | None
    ) -> AttentionState:
        pair = Problem.of(
            (prev, cur), out, problem.actual_seq_qlen, problem.layout, problem.softmax_layout, problem.profile,
            in_place=out is not None and problem.in_place, statistics=out is None or problem.statistics,
        )  # fmt: skip
        return self.update(pair, prev, cur, out)

    def _into(self, problem: Problem, state: AttentionState, out: AttentionState) -> AttentionState:
        return self._step(problem, state, self._neutral(problem, state), out)

    def _cast(self, state: AttentionState, dtype: str) -> AttentionState:
        with np.errstate(over="ignore"):
            return AttentionState(self.asarray(self.to_numpy(state.attn_out).astype(dtype)), *state[1:])

    def _neutral(self, problem: Problem, like: AttentionState) -> AttentionState:
        stats = np.dtype(problem.stats_dtype)
        return AttentionState(
            like.attn_out,  # not read: the side is empty
            self.asarray(np.full(problem.stats_shape, -np.inf, stats)),
            self.asarray(np.zeros(problem.stats_shape, stats)),
        )

    def asarray(self, array: np.ndarray) -> Any:
        """Turn a NumPy array into one of this backend's."""
        return array

    def to_numpy(self, array: Any) -> np.ndarray:
        """Turn one of this backend's arrays into a NumPy array."""
        return np.asarray(array)

    def synchronize(self) -> None:
        """Wait until everything asked for so far is done."""
