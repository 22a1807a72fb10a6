"""Which backend would run a call, and why the others would not."""

from __future__ import annotations

from typing import Any, NamedTuple

from rau import registry
from rau.call import NAMES
from rau.constraints import Options, bind
from rau.constraints.stacked import as_states
from rau.errors import RauError
from rau.problem import Problem
from rau.streaming import StreamingMerge


class Verdict(NamedTuple):
    """What speaks against one backend, if anything.

    Attributes
    ----------
    name : str
    limits : list of str or None
        Broken limits, each with the computed value; judged regardless of where the arrays are. None where the backend's
        module cannot even be imported.
    arrays : list of str or None
        What is wrong with the arrays' type or device.
    unavailable : str
        Why the backend cannot be used here; empty if no reason is known.
    tried : bool
        Whether an instance of it was made before, or for this call. No other is made in order to explain.
    """

    name: str
    limits: list[str] | None
    arrays: list[str] | None
    unavailable: str
    tried: bool

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        said = []
        if self.limits is not None and self.arrays is not None:
            said += ["; ".join(self.limits) or "within its limits", "; ".join(self.arrays) or "takes these arrays"]
        if self.unavailable:
            said.append(f"not available: {self.unavailable}")
        elif not self.tried:
            said.append("not tried yet")
        return f"{self.name}: {'; '.join(said)}"


class Explanation(NamedTuple):
    """The backend chosen for one call, and the reasons.

    Attributes
    ----------
    selected : str or None
        The backend that would run the call; None if the call would fail.
    origin : str
        Where the choice comes from.
    failure : str
        The message of the error that the call would raise; empty if it would run.
    verdicts : list of Verdict
        One for each known backend.
    problem : Problem
    """

    selected: str | None
    origin: str
    failure: str
    verdicts: list[Verdict]
    problem: Problem

    def __repr__(self) -> str:  # a notebook's last line
        return str(self)

    def __str__(self) -> str:
        if self.selected:
            outcome = f"runs on {self.selected} ({self.origin})"
        else:
            outcome = f"fails: {self.failure.splitlines()[0]}"
        return "\n".join([repr(self.problem), outcome, *(f"  {verdict}" for verdict in self.verdicts)])


def explain(
    prev_attn_out: Any,
    prev_softmax_max: Any = None,
    prev_softmax_sum: Any = None,
    cur_attn_out: Any = None,
    cur_softmax_max: Any = None,
    cur_softmax_sum: Any = None,
    actual_seq_qlen: Any = None,
    layout: str = "SBH",
    *,
    softmax_layout: str = "TND",
    out: Any = None,
    backend: Any = None,
    profile: str | None = None,
    check: str = "metadata",
) -> Explanation:
    """Tell which backend would run a call, and what speaks against each of the others.

    Parameters
    ----------
    prev_attn_out, prev_softmax_max, prev_softmax_sum, cur_attn_out, cur_softmax_max, cur_softmax_sum, \
actual_seq_qlen, layout, softmax_layout, out, backend, check
        As in :func:`rau.ring_attention_update`. Or, in the place of the six arrays: a list of states (or of one triple of K
        states), then perhaps lengths and a layout, and the call is :func:`rau.merge_states`; or a :class:`rau.StreamingMerge`
        that has a state, and it is its next update, of which the rest is known.
    profile : {"mindspore", "cann-v2", "portable"}, optional
        By default that of the call: "mindspore" for an update, "portable" for a merge.

    Returns
    -------
    Explanation
        Print it, or read its attributes. Limits are judged apart from the arrays' type and device, so that it is
        informative about an accelerator's backend even on a laptop.

    Raises
    ------
    ConstraintError
        If the call is not valid, just as the call itself would raise.

    Examples
    --------
    >>> import numpy as np, rau
    >>> out, stats = np.zeros((2, 1, 4), np.float32), np.ones((1, 1, 2, 8), np.float32)
    >>> rau.explain(out, stats, stats, out, stats, stats, backend="numpy").selected
    'numpy'
    >>> rau.explain([(out, stats, stats)] * 3, backend="numpy").problem.K
    3
    """
    if isinstance(prev_attn_out, StreamingMerge):
        problem, backend = prev_attn_out.next_update()
        return _explained(problem, backend)
    others = prev_softmax_max, prev_softmax_sum, cur_attn_out, cur_softmax_max, cur_softmax_sum
    if isinstance(prev_attn_out, (tuple, list)) and all([other is None for other in others[2:]]):
        if prev_softmax_max is not None:
            actual_seq_qlen = prev_softmax_max
        if prev_softmax_sum is not None:
            layout = prev_softmax_sum
        states, call = as_states(prev_attn_out, layout), "merge_states"
    else:
        states, call = ((prev_attn_out, *others[:2]), others[2:]), "ring_attention_update"
    if profile is None:
        profile = {"merge_states": "portable", "ring_attention_update": "mindspore"}[call]
    options = Options(layout, softmax_layout, profile, check)
    problem, _ = bind("explain", states, NAMES[call], actual_seq_qlen, options, out)
    return _explained(problem, backend)


def _explained(problem: Problem, backend: Any) -> Explanation:
    failure = ""
    chosen, origin = None, registry.requested(backend)[1]
    try:
        chosen, origin = registry.select(problem, backend)
    except RauError as error:
        failure = str(error)
    verdicts = []
    for status in registry.standings():
        limits = arrays = None
        if capabilities := registry.capabilities(status.name):
            limits, arrays = capabilities.limits_broken(problem), capabilities.arrays_refused(problem)
        known = status.state in ("unavailable", "blocked")
        verdicts.append(Verdict(status.name, limits, arrays, status.reason if known else "", status.state != "not tried"))
    return Explanation(chosen and chosen.name, origin, failure, verdicts, problem)
