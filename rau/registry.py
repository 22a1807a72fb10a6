"""Names, loading, status and selection of backends.

``cython`` and ``numpy`` are built in. Everything else is reached through the entry-point group
``rau.backends``, scanned on first need and loaded one at a time, or through :func:`register`.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from rau.backends import Backend, Capabilities
from rau.errors import BackendUnavailableError, RauError, UnknownBackendError, UnsupportedError
from rau.problem import Problem

__all__ = ["Status", "get", "names", "refresh", "register", "select", "status", "use_backend"]

GROUP = "rau.backends"
INSTALL_HINT = (
    "A third party's backend is found once its distribution is installed beside ring-attention-update "
    f'(entry-point group "{GROUP}"), or after rau.registry.register(...).'
)

_logger = logging.getLogger("rau")
_lock = threading.RLock()
# The innermost use_backend's name, and what was there before it.
_Requested = tuple[str, Any] | None
_requested: ContextVar[_Requested] = ContextVar("rau_backend", default=None)


class _Entry:
    """One known name: where it comes from, how to load it, and what came of it."""

    def __init__(self, origin: str, load: Callable[[], Any]) -> None:
        self.origin = origin
        self.load = load
        self.cls: Any = None
        self.instance: Any = None
        self.failure: BaseException | None = None
        self.notes: list[str] = []


class Status(NamedTuple):
    """What is known of one backend.

    Attributes
    ----------
    name : str
    available : bool
    state : {"available", "unavailable", "blocked"}
    reason : str
        Why it is not available, or what else there is to say; empty where there is nothing.
    origin : str
        "built in", "registered", or the distribution that declares it.
    """

    name: str
    available: bool
    state: str
    reason: str
    origin: str


def _builtin(module: str, name: str) -> _Entry:
    def load() -> Any:
        import importlib

        return getattr(importlib.import_module(module), name)

    return _Entry("built in", load)


_BUILT_IN = {
    "cython": ("rau.backends.cython_", "CythonBackend"),
    "numpy": ("rau.backends.numpy_", "NumPyBackend"),
}
# Who runs arrays of a kind of ours unasked, by kind and device, best first. Installing a plugin changes nothing here.
_AUTOMATIC = {
    ("numpy", "cpu"): ("cython", "numpy"),
    ("torch", "cpu"): ("cython", "torch"),
    ("torch", "cuda"): ("cuda", "torch"),
    ("torch", "npu"): ("ascend", "torch"),
    ("mindspore", "cpu"): ("cython", "numpy"),
    ("mindspore", "ascend"): ("ascend",),
}
_OURS = ("cython", "numpy", "torch", "cuda", "ascend")

_entries: dict[str, _Entry] = {name: _builtin(*where) for name, where in _BUILT_IN.items()}
_scanned = False
_warned = False


def _scan() -> None:
    """Read the entry points, once; nothing is imported."""
    global _scanned
    if _scanned:
        return
    with _lock:
        if _scanned:
            return
        from importlib.metadata import distributions

        found: dict[str, dict[str, Any]] = {}
        for distribution in distributions():
            try:
                points = distribution.entry_points.select(group=GROUP)
                owner = (points and distribution.name) or "an unknown distribution"
            except Exception:  # its metadata are broken: that must not hide the others
                continue
            for point in points:
                found.setdefault(point.name, {}).setdefault(owner, point)  # the first on the path is what is imported
        for name, owners in sorted(found.items()):
            if name in _entries:
                both = " and ".join(sorted(owners))
                _entries[name].notes.append(f"declared by {both} too, in vain: the name was taken")
            elif len(owners) == 1:
                ((owner, point),) = owners.items()
                _entries[name] = _Entry(owner, point.load)
            else:
                both = " and ".join(sorted(owners))
                _entries[name] = entry = _Entry(both, lambda: None)
                entry.failure = RauError(f'{both} both declare a backend "{name}"; uninstall one of them')
        _scanned = True


def names() -> list[str]:
    """Return every known name: this package's own first, then the others in alphabetical order.

    Returns
    -------
    list of str

    Examples
    --------
    >>> names()[:2]
    ['cython', 'numpy']
    """
    _scan()
    return [*(name for name in _OURS if name in _entries), *sorted(_entries.keys() - set(_OURS))]


def blocked() -> set[str]:
    """Names in the environment variable ``RAU_BLOCK``: never loaded."""
    return {name.strip() for name in os.environ.get("RAU_BLOCK", "").split(",")} - {""}


def _load(name: str) -> _Entry:
    """Load a known backend if that has not been tried; what came of it is in the entry."""
    entry = _entries[name]
    if entry.instance is None:
        with _lock:
            _load_class(name)
            if entry.instance is None and entry.failure is None:
                with _attempt(entry):
                    entry.instance = entry.cls() if isinstance(entry.cls, type) else entry.cls
    return entry


def _load_class(name: str) -> Any:
    """Import a backend's class, without making an instance; None where that fails."""
    entry = _entries[name]
    with _lock:
        if entry.cls is None and entry.failure is None:
            with _attempt(entry):
                if name in blocked():
                    raise BackendUnavailableError(f"RAU_BLOCK = {os.environ['RAU_BLOCK']!r} names it")
                cls = entry.load()
                if fault := _fault(cls):
                    raise BackendUnavailableError(f"{cls!r} is no backend: {fault}")
                entry.cls = cls
    return entry.cls


@contextmanager
def _attempt(entry: _Entry) -> Iterator[None]:
    """Note in the entry what goes wrong: a plugin may do anything while it is loaded."""
    entry.failure = BackendUnavailableError("it is still being loaded")  # what one hears that asks for itself
    try:
        yield
        entry.failure = None
    except (Exception, SystemExit) as error:
        entry.failure = error
    except BaseException:  # interrupted: the next one tries again
        entry.failure = None
        raise


def _fault(backend: Any) -> str:
    """What a class or an instance lacks to be a backend; empty where it lacks nothing."""
    if not isinstance(getattr(backend, "capabilities", None), Capabilities):
        return "it has no attribute `capabilities`, a rau.backends.Capabilities"
    return "" if callable(getattr(backend, "update", None)) else "it has no method `update`"


def _known(name: str) -> bool:
    if name in _entries:
        return True
    _scan()
    return name in _entries


def get(name: str, origin: str = "") -> Any:
    """Return a backend by name.

    Parameters
    ----------
    name : str
    origin : str, optional
        Where the name comes from, for messages.

    Returns
    -------
    Backend
        One instance for the whole process.

    Raises
    ------
    UnknownBackendError
        If nobody has registered the name.
    BackendUnavailableError
        If it cannot be used here; the cause is chained.

    Examples
    --------
    >>> get("numpy").name
    'numpy'
    """
    asked = f" (asked for by {origin})" if origin else ""
    if not isinstance(name, str) or not _known(name):
        import difflib

        text = f"no backend is called {name!r}{asked}; known are {', '.join(names())}."
        close = difflib.get_close_matches(name, names(), n=1) if isinstance(name, str) else []
        if close:
            text += f' Did you mean "{close[0]}"?'
        raise UnknownBackendError(f"{text} {INSTALL_HINT}")
    entry = _load(name)
    if entry.failure is not None:
        raise BackendUnavailableError(
            f'backend "{name}" is not available{asked}: {_reason(entry.failure)}', name=name
        ) from entry.failure
    return entry.instance


def _reason(failure: BaseException) -> str:
    text = " ".join(str(failure).split()) or "no reason given"
    return text if isinstance(failure, RauError) else f"{type(failure).__name__}: {text}"


def status() -> list[Status]:
    """Try every backend and tell what came of it.

    Returns
    -------
    list of Status
        In the order of :func:`names`.
    """
    result = []
    for name in names():
        entry = _load(name)
        state = "available" if entry.failure is None else "unavailable"
        if entry.failure is not None and name in blocked():
            state = "blocked"
        reason = [] if entry.failure is None else [_reason(entry.failure)]
        result.append(Status(name, entry.failure is None, state, "; ".join(reason + entry.notes), entry.origin))
    return result


def register(backend: Any, name: str | None = None) -> None:
    """Make a backend known to this process.

    Parameters
    ----------
    backend : Backend or type
        An instance, or a class that is called without arguments on first need.
    name : str, optional
        The backend's own name by default.

    Raises
    ------
    UnknownBackendError
        If it has no name, or one that is taken, or is no backend.
    """
    name = name or getattr(backend, "name", None)
    if not isinstance(name, str) or not name:
        raise UnknownBackendError(f"{backend!r} has no name; expected a class attribute `name`, a str.")
    if fault := _fault(backend):
        raise UnknownBackendError(f"{backend!r} is no backend: {fault}.")
    with _lock:
        if _known(name):
            taken = _entries[name].origin
            raise UnknownBackendError(f'the name "{name}" is taken ({taken}); choose another one.')
        _entries[name] = _Entry("registered", lambda: backend)


@contextmanager
def provisionally(backend: Any) -> Iterator[None]:
    """Make a backend known for the length of a ``with`` block, in place of another one of its name.

    Parameters
    ----------
    backend : Backend
        An instance, such as a kernel under development that is being checked.
    """
    _known(backend.name)
    before = _entries.get(backend.name)
    entry = _Entry("under test", lambda: backend)
    entry.cls = entry.instance = backend
    _entries[backend.name] = entry
    try:
        yield
    finally:
        if before is None:
            del _entries[backend.name]
        else:
            _entries[backend.name] = before


def refresh() -> None:
    """Forget what was loaded, what failed and what was registered; entry points are scanned anew on first need."""
    global _scanned, _warned
    with _lock:
        _entries.clear()
        _entries.update({name: _builtin(*where) for name, where in _BUILT_IN.items()})
        _scanned = _warned = False


def array_types() -> set[str]:
    """Types that the known plugins take, as "module:qualname"; imports their modules, makes no instance."""
    types: set[str] = set()
    for name in names():
        declared = capabilities(name)
        if declared is not None:
            types.update(declared.array_types)
    return types


def capabilities(name: str) -> Any:
    """Capabilities of a known backend, available here or not; None where its module cannot be imported."""
    cls = _load_class(name) if _known(name) else None
    return None if cls is None else cls.capabilities


class use_backend(ContextDecorator):  # noqa: N801 - used like a function
    """Choose the backend of every call inside a ``with`` block or a decorated function.

    Parameters
    ----------
    name : str
        Strict: that backend runs the calls, or they fail. A ``backend=`` argument still wins.

    Raises
    ------
    UnknownBackendError
        On entry, if nobody has registered the name.

    Notes
    -----
    The choice is a context variable: threads and asyncio tasks each have their own. A decorated coroutine function
    has it while it runs. A generator would leave it to whoever asks for the next item: use a ``with`` block there.

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
            raise TypeError(f"use_backend decorates no generator: use a with block inside {func.__qualname__}.")
        if not inspect.iscoroutinefunction(func):
            return super().__call__(func)

        @functools.wraps(func)
        async def inner(*args: Any, **kwargs: Any) -> Any:
            with self:
                return await func(*args, **kwargs)

        return inner

    def __enter__(self) -> use_backend:
        if not isinstance(self.name, str) or not _known(self.name):
            get(self.name, "use_backend")
        _requested.set((self.name, _requested.get()))
        return self

    def __exit__(self, *exc: object) -> None:
        # No token is kept: one object may be entered by several threads at once.
        inner = _requested.get()
        _requested.set(inner and inner[1])


def requested(backend: Any = None) -> tuple[Any, str]:
    """Return the backend that is asked for and by whom; (None, "automatic") where nobody asks.

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
    name = os.environ.get("RAU_BACKEND")
    if name:
        return name, "RAU_BACKEND"
    return None, "automatic"


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
        If the backend asked for does not exist, or not here.
    UnsupportedError
        If it does not take the problem; without a request, if none does.
    """
    choice, origin = requested(backend)
    if choice is None:
        for name in automatic(problem):
            if not _known(name):
                continue
            entry = _load(name)
            if entry.failure is None:
                if not reasons_against(entry.instance, problem):
                    return entry.instance, origin
            elif name == "cython":
                _warn_core_missing(entry.failure)
        listing = "\n".join(f"  {line}" for line in judge(problem))
        raise UnsupportedError(f"no backend takes {problem!r} unasked:\n{listing}")
    if isinstance(choice, str):
        instance = get(choice, origin)
    else:
        instance = choice
        fault = "it is a class" if isinstance(instance, type) else _fault(instance)
        if fault:
            raise UnknownBackendError(f"{origin}{instance!r} is no backend: {fault}; expected a name or an instance.")
    reasons = reasons_against(instance, problem)
    if reasons:
        listing = "\n".join(f"  {line}" for line in judge(problem))
        raise UnsupportedError(
            f'backend "{instance.name}" (asked for by {origin}) does not take {problem!r}: {"; ".join(reasons)}.\n'
            f"All backends:\n{listing}"
        )
    return instance, origin


def automatic(problem: Problem) -> tuple[str, ...]:
    """Names to try for a problem without a request, best first."""
    ours = _AUTOMATIC.get((problem.kind, problem.device.partition(":")[0]))
    if ours is not None:
        return ours
    if problem.kind == "torch":
        return ("torch",)
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


def judge(problem: Problem) -> list[str]:
    """One line for each known backend: whether it takes the problem, and if not, why not."""
    lines = []
    for one in status():
        if not one.available:
            lines.append(f"{one.name}: {one.state}: {one.reason}")
        else:
            reasons = reasons_against(get(one.name), problem)
            lines.append(f"{one.name}: {'; '.join(reasons) if reasons else 'takes it'}")
    return lines


def _warn_core_missing(failure: BaseException) -> None:
    global _warned
    with _lock:
        news, _warned = not _warned, True
    if news and "cython" not in blocked():
        frame, level = sys._getframe(1), 2
        while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "rau":
            frame, level = frame.f_back, level + 1  # the caller's line is the one to show
        warnings.warn(
            f"rau runs on NumPy, several times slower with the same bits: {_reason(failure)}",
            RuntimeWarning,
            stacklevel=level,
        )


def log_call(call: str, backend: Backend, origin: str) -> None:
    """One DEBUG line a call, on the logger "rau"."""
    if _logger.isEnabledFor(logging.DEBUG):
        _logger.debug("%s: backend %s (%s)", call, backend.name, origin)
