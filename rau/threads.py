"""How many threads the compiled core uses."""

from __future__ import annotations

import os

from rau.errors import OptionError

_MOST = 1024


def _from_environment() -> int:
    """The first number of OMP_NUM_THREADS (a list gives one for each nesting level), else the usable CPUs."""
    text = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if text.isdecimal() and 0 < int(text) <= _MOST:
        return int(text)
    if hasattr(os, "sched_getaffinity"):
        return max(len(os.sched_getaffinity(0)), 1)
    return os.cpu_count() or 1


_threads = _from_environment()


def get_num_threads() -> int:
    """Return the most threads that one call uses.

    Returns
    -------
    int
        At first from ``OMP_NUM_THREADS``, else the number of CPUs this process may use. A forked child runs serially,
        whatever this says: OpenMP does not survive a fork.

    Examples
    --------
    >>> get_num_threads() >= 1
    True
    """
    return _threads


def set_num_threads(n: int) -> None:
    """Set the most threads that one call uses, in the whole process. The result's bits do not depend on it.

    Parameters
    ----------
    n : int
        1 or more.

    Raises
    ------
    OptionError
        If `n` is no positive integer.

    Examples
    --------
    >>> before = get_num_threads()
    >>> set_num_threads(1)
    >>> set_num_threads(before)
    """
    global _threads
    if isinstance(n, bool) or not hasattr(n, "__index__"):
        raise OptionError(f"set_num_threads: n = {n!r}; expected an int from 1 to {_MOST}.", ("threads",))
    n = n.__index__()
    if not 1 <= n <= _MOST:
        raise OptionError(f"set_num_threads: n = {n}; expected an int from 1 to {_MOST}.", ("threads",))
    _threads = n
