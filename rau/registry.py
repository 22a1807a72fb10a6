"""The backends: names, status and selection. How they are found and loaded is in `rau.plugins`."""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import ContextDecorator
from contextvars import ContextVar
from typing import Any

from rau.arrays import foreign_types
from rau.errors import UnknownBackendError, UnsupportedError, shown
from rau.plugins import (
    Entry,
    Status,
    array_types,
    blocked,
    capabilities,
    find,
    first_told,
    get,
    known,
    load,
    missing_part,
    names,
    nearly,
    provisionally,
    reason_of,
    refresh,
    register,
    standings,
    status,
)
from rau.problem import Problem

foreign_types.append(array_types)

__all__ = [
    "Status", "array_types", "blocked", "capabilities", "get", "keeps_lse", "known", "names", "nearly", "provisionally", "refresh",
    "register", "select", "standings", "status", "use_backend",
]  # fmt: skip

# The innermost use_backend's name, and what was there before it.
_Requested = tuple[str, Any] | None
_logger: Any = None
_KEY = os.environ.encodekey("RAU_BACKEND") if hasattr(os.environ, "encodekey") else "RAU_BACKEND"
_DEBUG = 10  # logging.DEBUG
_requested: ContextVar[_Requested] = ContextVar("rau_backend", default=None)

# Who runs arrays of a kind of ours unasked, by kind and device, best first. Installing a plugin changes nothing here.
_AUTOMATIC = {
    ("numpy", "cpu"): ("cython", "numpy"),
    ("torch", "cpu"): ("cython", "torch"),
    ("torch", "cuda"): ("cuda", "torch"),
    ("torch", "npu"): ("ascend", "torch"),
    ("jax", "cpu"): ("jax", "jax_numpy"),
    ("mindspore", "cpu"): ("cython", "numpy"),
    ("mindspore", "ascend"): ("ascend",),
}


class use_backend(ContextDecorator):
    """Choose the backend of every call inside a ``with`` block or a decorated function.

    Parameters
    ----------
    name : str
        The choice is strict: that backend runs the calls, or they fail. A ``backend=`` argument still takes precedence.

    Raises
    ------
    UnknownBackendError
        On entry, if the name is not registered.

    Notes
    -----
    The choice is a context variable: threads and asyncio tasks each have their own. It holds for a decorated coroutine
    function while that runs. A generator would leak it to whoever asks for the next item: use a ``with`` block there.

    Examples
    --------
    >>> import rau
    >>> with rau.use_backend("numpy"):
    ...     rau.registry.requested()
    ('numpy', 'use_backend')
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, func: Any) -> Any:
        import functools
        import inspect

        if inspect.isgeneratorfunction(func) or inspect.isasyncgenfunction(func):
            raise TypeError(f"use_backend cannot decorate a generator: use a with block inside {func.__qualname__}.")
        if not inspect.iscoroutinefunction(func):
            return super().__call__(func)

        @functools.wraps(func)
        async def inner(*args: Any, **kwargs: Any) -> Any:
            with self:
                return await func(*args, **kwargs)

        return inner

    def __enter__(self) -> use_backend:
        if not isinstance(self.name, str) or not known(self.name):
            get(self.name, "use_backend")
        _requested.set((self.name, _requested.get()))
        return self

    def __exit__(self, *exc: object) -> None:
        # No token is kept: one object may be entered by several threads at once.
        inner = _requested.get()
        _requested.set(inner and inner[1])


def requested(backend: Any = None) -> tuple[Any, str]:
    """Return the backend that is asked for, and what asks for it; (None, "automatic") if nothing does.

    Parameters
    ----------
    backend : str or Backend, optional
        The ``backend=`` argument of a call.

    Returns
    -------
    tuple
        Name or instance, and the origin of the choice.
    """
    if backend is not None:
        return backend, "backend="
    inner = _requested.get()
    if inner is not None:
        return inner[0], "use_backend"
    name = _environment()
    if name:
        return name, "RAU_BACKEND"
    return None, "automatic"


def _environment() -> str | None:
    """RAU_BACKEND, as Python has it: C's getenv is not safe beside a library that sets variables in a thread of its own."""
    # The mapping behind os.environ, which is asked at every call: by os.environ itself it takes thirty times as long to say no.
    data = getattr(os.environ, "_data", None)
    return os.environ.get("RAU_BACKEND") if data is None or _KEY in data else None


def select(problem: Problem, backend: Any = None) -> tuple[Any, str]:
    """Choose the backend that runs a problem.

    Parameters
    ----------
    problem : Problem
    backend : str or Backend, optional
        The ``backend=`` argument of a call.

    Returns
    -------
    backend : Backend
    origin : str
        Where the choice comes from: "backend=", "use_backend", "RAU_BACKEND" or "automatic".

    Raises
    ------
    UnknownBackendError, BackendUnavailableError
        If the backend asked for does not exist, or cannot be used here.
    UnsupportedError
        If it does not take the problem; without a request, if no backend does.
    """
    choice, origin = requested(backend)
    if choice is None:
        for name in automatic(problem):
            entry = find(name)
            if entry is None:
                continue
            load(entry, name)
            if entry.failure is None:
                if problem.taken_by is entry.instance or not reasons_against(entry.instance, problem):
                    vars(problem)["taken_by"] = entry.instance  # not a backend's to write, but ours
                    return entry.instance, origin
            elif name == "cython":
                _warn_core_missing(entry)
        raise UnsupportedError(f"no backend takes {problem!r} unasked:\n{reasons_of_all(problem)}")
    if isinstance(choice, str):
        instance = get(choice, origin)
    else:
        instance = choice
        fault = "it is a class" if isinstance(instance, type) else missing_part(instance)
        if fault:
            raise UnknownBackendError(f"{origin}{shown(instance)} is not a backend: {fault}; expected a name or an instance.")
    reasons = reasons_against(instance, problem)
    if reasons:
        raise UnsupportedError(
            f'backend "{instance.name}" (asked for by {origin}) does not take {problem!r}: {"; ".join(reasons)}.\n'
            f"All backends:\n{reasons_of_all(problem)}"
        )
    return instance, origin


def keeps_lse(backend: Any = None) -> bool:
    """Tell whether the backend that is asked for returns a log-sum-exp in the place of the maximum, as none does unasked."""
    choice, _ = requested(backend)
    takes = capabilities(choice) if isinstance(choice, str) else getattr(choice, "capabilities", None)
    return takes is not None and bool(takes.statistics == "lse")


def automatic(problem: Problem) -> tuple[str, ...]:
    """Names to try for a problem for which no backend was asked, best first."""
    place = problem.kind, problem.device.partition(":")[0]
    if place in _AUTOMATIC:  # and no get(), as rau.constraints.cache says
        return _AUTOMATIC[place]
    if problem.kind == "torch":
        return ("torch",)
    if problem.kind == "jax":
        return ("jax_numpy",)
    # An array type of a plugin's own: the plugins that name it.
    takers = []
    for name in names():
        declared = capabilities(name)
        if declared is not None and set(problem.array_types) & set(declared.array_types):
            takers.append(name)
    return tuple(takers)


def reasons_against(backend: Any, problem: Problem) -> list[str]:
    """All that speaks against running a problem by a backend; empty where nothing does."""
    capabilities = backend.capabilities
    return capabilities.arrays_refused(problem) + capabilities.limits_broken(problem)


def reasons_of_all(problem: Problem) -> str:
    """One line for each known backend: whether it takes the problem and, if not, why; no backend is tried for this."""
    lines = []
    for one in standings():
        declared = capabilities(one.name)
        if one.state in ("unavailable", "blocked") or declared is None:
            lines.append(f"  {one.name}: {one.state}: {one.reason}")
        else:
            reasons = declared.arrays_refused(problem) + declared.limits_broken(problem)
            tried = "" if one.available else " (not tried yet)"
            lines.append(f"  {one.name}: {'; '.join(reasons) if reasons else f'takes it{tried}'}")
    return "\n".join(lines)


def _warn_core_missing(entry: Entry) -> None:
    """Warn once, unless the user has blocked the core."""
    assert entry.failure is not None
    if first_told(entry) and "cython" not in blocked():
        frame, level = sys._getframe(1), 2
        while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "rau":
            frame, level = frame.f_back, level + 1  # the caller's line is the one to show
        warnings.warn(
            f"rau runs on NumPy, several times slower but with the same bits: {reason_of(entry.failure)}",
            RuntimeWarning,
            stacklevel=level,
        )


def log_call(call: str, backend: Any, origin: str) -> None:
    """Log one DEBUG line per call, on the logger "rau"."""
    _log("%s: backend %s (%s)", call, backend.name, origin)


def log_copies(call: str, backend: Any, count: int) -> None:
    """Log one DEBUG line more for a call whose arrays are copied for a backend."""
    _log("%s: backend %s takes contiguous arrays: %d are copied for it", call, backend.name, count)


def _log(line: str, *words: Any) -> None:
    global _logger
    if _logger is None:
        if "logging" not in sys.modules:
            return  # nobody listens, and importing it would be a quarter of what `import rau` costs
        try:
            _logger = sys.modules["logging"].getLogger("rau")
        except (KeyError, AttributeError):  # another thread is half way through importing it, or has failed to
            return
    if _logger.isEnabledFor(_DEBUG):
        _logger.debug(line, *words)
