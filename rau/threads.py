"""How many threads the compiled core uses."""

from __future__ import annotations

import operator
import os

import numpy as np

from rau.errors import OptionError, shown

try:
    from rau._core import processors
except ImportError:  # not compiled: no threads either

    def processors() -> int:
        """Count no CPUs."""
        return 0


_MOST = 1024


def _at_start() -> tuple[int, str]:
    """The first number of OMP_NUM_THREADS (a list gives one for each nesting level), else the usable CPUs."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    text = given.partition(",")[0].strip()
    if text.isdecimal() and len(text) < 100 and 0 < int(text) <= _MOST:  # Python converts no text of thousands of digits
        return int(text), "OMP_NUM_THREADS"
    cpus = processors() or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    ignored = f", since OMP_NUM_THREADS = {shown(given)} is not a number from 1 to {_MOST}" if given else ""
    return min(cpus or 1, _MOST), f"the CPUs this process may use{ignored}"


_threads, _origin = _at_start()


def threads_origin() -> str:
    """Tell where the current number of threads comes from."""
    return _origin


def get_num_threads() -> int:
    """Return the maximum number of threads that one call uses.

    Returns
    -------
    int
        Initially from ``OMP_NUM_THREADS``, or else the number of CPUs this process may use. A forked child runs serially,
        whatever this says: OpenMP does not survive a fork.

    Examples
    --------
    >>> get_num_threads() >= 1
    True
    """
    return _threads


def set_num_threads(n: int) -> None:
    """Set the maximum number of threads that one call uses, in the whole process. The result's bits do not depend on it.

    Parameters
    ----------
    n : int
        1 or more.

    Raises
    ------
    OptionError
        If `n` is not a positive integer.

    Examples
    --------
    >>> before = get_num_threads()
    >>> set_num_threads(1)
    >>> set_num_threads(before)
    """
    global _threads, _origin
    try:
        number = 0 if isinstance(n, (bool, np.bool_)) else operator.index(n)
    except Exception:  # TypeError, or whatever its __index__ does
        number = 0
    if not 1 <= number <= _MOST:
        raise OptionError(f"set_num_threads: n = {shown(n)}; expected an int from 1 to {_MOST}.", ("threads",))
    _threads, _origin = number, "set_num_threads"
