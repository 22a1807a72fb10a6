"""Names and loading of backends: which are known, whether loading them succeeded, and why not.

``cython`` and ``numpy`` are built in. Everything else is reached through the entry-point group
``rau.backends``, scanned when first needed and loaded one at a time, or through :func:`register`.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from rau.backends import Capabilities
from rau.errors import BackendUnavailableError, RauError, UnknownBackendError

GROUP = "rau.backends"
INSTALL_HINT = (
    "A third-party backend is found once its distribution is installed alongside ring-attention-update "
    f'(entry-point group "{GROUP}"), or after rau.registry.register(...).'
)

lock = threading.RLock()


class Entry:
    """One known name: where it comes from, how to load it, and what came of it."""

    def __init__(self, origin: str, load: Callable[[], Any]) -> None:
        self.origin = origin
        self.load = load
        self.cls: Any = None
        self.instance: Any = None
        self.failure: BaseException | None = None
        self.notes: list[str] = []
        self.told = False  # a user knows that it is missing


class Status(NamedTuple):
    """What is known of one backend.

    Attributes
    ----------
    name : str
    available : bool
    state : {"available", "unavailable", "blocked", "not tried"}
    reason : str
        Why it is not available, or any other note; empty if there is none.
    origin : str
        "built in", "registered", or the distribution that declares it.
    """

    name: str
    available: bool
    state: str
    reason: str
    origin: str


def _builtin(module: str, name: str) -> Entry:
    def find() -> Any:
        import importlib

        return getattr(importlib.import_module(module), name)

    return Entry("built in", find)


_BUILT_IN = {
    "cython": ("rau.backends.cython_", "CythonBackend"),
    "numpy": ("rau.backends.numpy_", "NumPyBackend"),
}
_OURS = ("cython", "numpy", "torch", "cuda", "ascend")

_entries: dict[str, Entry] = {name: _builtin(*where) for name, where in _BUILT_IN.items()}
_scanned = False


def _scan() -> None:
    """Read the entry points, once; nothing is imported."""
    global _scanned
    if _scanned:
        return
    with lock:
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
                _entries[name].notes.append(f"also declared by {both}, which is ignored: the name was taken")
            elif len(owners) == 1:
                ((owner, point),) = owners.items()
                _entries[name] = Entry(owner, point.load)
            else:
                both = " and ".join(sorted(owners))
                _entries[name] = entry = Entry(both, lambda: None)
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
    """Names in the environment variable ``RAU_BLOCK``, which are never loaded."""
    return {name.strip() for name in os.environ.get("RAU_BLOCK", "").split(",")} - {""}


def load(name: str) -> Entry:
    """Load a known backend if that has not been tried; the outcome is in the entry."""
    entry = _entries[name]
    if entry.instance is None:
        with lock:
            load_class(name)
            if entry.instance is None and entry.failure is None:
                with _attempt(entry):
                    entry.instance = entry.cls() if isinstance(entry.cls, type) else entry.cls
    return entry


def load_class(name: str) -> Any:
    """Import a backend's class, without making an instance; None where that fails."""
    entry = _entries[name]
    with lock:
        if entry.cls is None and entry.failure is None:
            with _attempt(entry):
                if name in blocked():
                    raise BackendUnavailableError(f"RAU_BLOCK = {os.environ['RAU_BLOCK']!r} names it")
                cls = entry.load()
                if fault := missing_part(cls):
                    raise BackendUnavailableError(f"{cls!r} is not a backend: {fault}")
                entry.cls = cls
    return entry.cls


@contextmanager
def _attempt(entry: Entry) -> Iterator[None]:
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


def missing_part(backend: Any) -> str:
    """Say what a class or an instance lacks to be a backend; empty where it lacks nothing."""
    if not isinstance(getattr(backend, "capabilities", None), Capabilities):
        return "it has no attribute `capabilities`, a rau.backends.Capabilities"
    return "" if callable(getattr(backend, "update", None)) else "it has no method `update`"


def known(name: str) -> bool:
    """Tell whether a name has been declared or registered."""
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
        If the name is not registered.
    BackendUnavailableError
        If it cannot be used here; the cause is chained.

    Examples
    --------
    >>> get("numpy").name
    'numpy'
    """
    asked = f" (asked for by {origin})" if origin else ""
    if not isinstance(name, str) or not known(name):
        import difflib

        text = f"no backend is called {name!r}{asked}; the known ones are {', '.join(names())}."
        close = difflib.get_close_matches(name, names(), n=1) if isinstance(name, str) else []
        if close:
            text += f' Did you mean "{close[0]}"?'
        raise UnknownBackendError(f"{text} {INSTALL_HINT}")
    entry = load(name)
    if entry.failure is not None:
        raise BackendUnavailableError(
            f'backend "{name}" is not available{asked}: {reason_of(entry.failure)}', name=name
        ) from entry.failure
    return entry.instance


def reason_of(failure: BaseException) -> str:
    """Put a failure into one line."""
    text = " ".join(str(failure).split()) or "no reason given"
    return text if isinstance(failure, RauError) else f"{type(failure).__name__}: {text}"


def status() -> list[Status]:
    """Try every backend and return the outcome.

    Returns
    -------
    list of Status
        In the order of :func:`names`.
    """
    for name in names():
        load(name)
    return standings()


def standings() -> list[Status]:
    """Tell what is known of every backend from its class and earlier attempts: no instance is made, no library imported."""
    result = []
    for name in names():
        cls, entry = load_class(name), _entries[name]
        state, reason = "not tried", []
        if entry.instance is not None:
            state = "available"
        elif entry.failure is not None:
            state, reason = "blocked" if name in blocked() else "unavailable", [reason_of(entry.failure)]
        elif libraries := _missing_libraries(cls.capabilities):
            state, reason = "unavailable", [f"it takes arrays of {' or '.join(libraries)}, which is not installed"]
        result.append(Status(name, state == "available", state, "; ".join(reason + entry.notes), entry.origin))
    return result


def _missing_libraries(declared: Capabilities) -> list[str]:
    """Libraries of the arrays that a backend takes, where none of them is here."""
    from importlib.util import find_spec  # for messages alone

    libraries = sorted({name.partition(":")[0].partition(".")[0] for name in declared.array_types})
    here = [name for name in libraries if sys.modules.get(name) or find_spec(name)]
    return [] if here else libraries


def register(backend: Any, name: str | None = None) -> None:
    """Make a backend known to this process.

    Parameters
    ----------
    backend : Backend or type
        An instance, or a class that is called without arguments when first needed.
    name : str, optional
        The backend's own name by default.

    Raises
    ------
    UnknownBackendError
        If it has no name, its name is taken, or it is not a backend.
    """
    name = name or getattr(backend, "name", None)
    if not isinstance(name, str) or not name:
        raise UnknownBackendError(f"{backend!r} has no name; expected a class attribute `name`, a str.")
    if fault := missing_part(backend):
        raise UnknownBackendError(f"{backend!r} is not a backend: {fault}.")
    with lock:
        if known(name):
            taken = _entries[name].origin
            raise UnknownBackendError(f'the name "{name}" is taken ({taken}); choose another one.')
        _entries[name] = Entry("registered", lambda: backend)


@contextmanager
def provisionally(backend: Any) -> Iterator[None]:
    """Make a backend known for the duration of a ``with`` block, in place of any other with its name.

    Parameters
    ----------
    backend : Backend
        An instance, such as a kernel under development that is being checked.
    """
    known(backend.name)
    before = _entries.get(backend.name)
    entry = Entry("under test", lambda: backend)
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
    """Forget what was loaded, what failed and what was registered; entry points are scanned again when first needed."""
    global _scanned
    with lock:
        _entries.clear()
        _entries.update({name: _builtin(*where) for name, where in _BUILT_IN.items()})
        _scanned = False


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
    cls = load_class(name) if known(name) else None
    return None if cls is None else cls.capabilities
