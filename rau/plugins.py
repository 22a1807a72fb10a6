"""Names and loading of backends: which are known, whether loading them succeeded, and why not.

``cython`` and ``numpy`` are built in. Everything else is reached through the entry-point group
``rau.backends``, scanned when first needed and loaded one at a time, or through :func:`register`.
"""

from __future__ import annotations

import os
import sys
from _thread import (
    RLock,  # threading's own, without the 1 ms that importing threading takes
)
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple, TypeVar

from rau.errors import BackendUnavailableError, RauError, UnknownBackendError, ran_out, shown

GROUP = "rau.backends"
INSTALL_HINT = (
    "A third-party backend is found once its distribution is installed alongside ring-attention-update "
    f'(entry-point group "{GROUP}"), or after rau.registry.register(...).'
)

lock = RLock()
_Function = TypeVar("_Function", bound=Callable[..., Any])


def _one_at_a_time(function: _Function) -> _Function:
    """Have a function called under the lock, which is given back whenever Ctrl-C comes.

    A `with` block does not promise that: Python 3.14 looks for signals between taking the lock and entering the block.
    """

    @wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        held = lock  # a child that is forked meanwhile has another one
        try:
            held.acquire()
            return function(*arguments, **options)
        finally:
            try:
                held.release()
            except RuntimeError:  # interrupted while waiting: it is not ours
                pass

    return call  # type: ignore[return-value]


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
OURS = ("cython", "numpy", "torch", "cuda", "ascend", "jax", "jax_numpy")

_RESERVED = tuple(name for name in OURS if name not in _BUILT_IN)  # by entry points of our own distribution alone


def _built_in() -> dict[str, Entry]:
    return {name: _builtin(*where) for name, where in _BUILT_IN.items()}


# The table as it stands, and the last one that entry points were read into. A refresh puts another one in its place: who has
# an entry in hand goes on with that.
_entries: dict[str, Entry] = _built_in()
_scanned: dict[str, Entry] | None = None


def _scan() -> dict[str, Entry]:
    """Return the table, its entry points read; nothing is imported."""
    entries = _entries
    return entries if entries is _scanned else _read_entry_points()


@_one_at_a_time
def _read_entry_points() -> dict[str, Entry]:
    global _scanned
    entries = _entries
    if entries is not _scanned:
        entries.update(_declared(entries))
        _scanned = entries
    return entries


def _declared(taken: dict[str, Entry]) -> dict[str, Entry]:
    """Read the entry points of all distributions; a claim on a name that is taken is noted there."""
    from importlib.metadata import distributions

    from rau.install import DISTRIBUTION

    # Without a file descriptor left it finds nothing, says nothing, and remembers that: this says so instead.
    os.close(os.open(os.devnull, os.O_RDONLY))
    found: dict[str, dict[str, Any]] = {}
    for distribution in distributions():
        try:
            points = distribution.entry_points.select(group=GROUP)
            owner = (points and distribution.name) or "an unknown distribution"
        except Exception as error:  # its metadata are broken: that must not hide the others
            if ran_out(error):
                raise
            continue
        for point in points:
            found.setdefault(point.name, {}).setdefault(owner, point)  # the first on the path is what is imported
    entries: dict[str, Entry] = {}
    for name, owners in sorted(found.items()):
        ours = owners.pop(DISTRIBUTION, None) if name in _RESERVED else None
        others = " and ".join(sorted(owners))
        if ours is not None:
            entries[name] = Entry(DISTRIBUTION, ours.load)
        if name in taken or ours is not None:
            note = [f"also declared by {others}, which is ignored: the name was taken"] if others else []
            (taken.get(name) or entries[name]).notes.extend(note)
        elif name in _RESERVED:
            entries[name] = _refused(others, f"declared by {others}, which is ignored: the name is kept for {DISTRIBUTION}")
        elif len(owners) > 1:
            entries[name] = _refused(others, f'{others} both declare a backend "{name}"; uninstall one of them')
        else:
            entries[name] = Entry(others, owners[others].load)
    return entries


def _refused(owners: str, reason: str) -> Entry:
    """Make the entry of a name that nobody may have."""
    entry = Entry(owners, lambda: None)
    entry.failure = RauError(reason)
    return entry


_PATIENCE = 30.0  # seconds that a fork waits for a plugin to be loaded


def _before_fork() -> None:
    """Wait until nothing is being loaded: a library that another thread has half imported cannot be imported in the child."""
    lock.acquire(timeout=_PATIENCE)


def _after_in_parent() -> None:
    try:
        lock.release()
    except RuntimeError:  # the wait was too long, or interrupted: it is not ours
        pass


def _after_in_child() -> None:
    """Nobody is left who would release the lock, or finish what was being loaded all the same."""
    global lock
    lock = RLock()
    for entry in list(_entries.values()):
        if isinstance(entry.failure, _BeingLoaded):
            entry.failure = None


_guarded = False


def _guard_forks() -> None:
    """Register what a fork has to do, before the first plugin is loaded.

    Not earlier: what was registered last is run first, and to wait with logging's lock, which its own does not give back until
    the fork is made, would be to wait for a library that logs.
    """
    global _guarded
    if not _guarded and hasattr(os, "register_at_fork"):
        import logging  # noqa: F401

        _guarded = True
        os.register_at_fork(before=_before_fork, after_in_parent=_after_in_parent, after_in_child=_after_in_child)


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
    return _in_order(_scan())


def _in_order(entries: dict[str, Entry]) -> list[str]:
    known = set(entries)
    return [*(name for name in OURS if name in known), *sorted(known - set(OURS))]


def blocked() -> set[str]:
    """Names in the environment variable ``RAU_BLOCK``, which are never loaded."""
    return {name.strip() for name in os.environ.get("RAU_BLOCK", "").split(",")} - {""}


def find(name: str) -> Entry | None:
    """Return the entry of a name, as it is; None for one that nobody has declared or registered."""
    return _entries.get(name) or _scan().get(name)


def load(entry: Entry, name: str) -> Entry:
    """Load a backend if that has not been tried; what came of it is in its entry."""
    if entry.instance is None:
        _make_instance(entry, name)
    return entry


@_one_at_a_time
def _make_instance(entry: Entry, name: str) -> None:
    load_class(entry, name)
    if entry.instance is None and entry.cls is not None and _to_be_tried(entry):
        _attempt(entry, "instance", lambda: entry.cls() if isinstance(entry.cls, type) else entry.cls)


def load_class(entry: Entry, name: str) -> Any:
    """Import a backend's class, without making an instance; None where that fails. Who comes second waits for the first."""
    if entry.cls is None:
        _import_class(entry, name)
    return entry.cls


@_one_at_a_time
def _import_class(entry: Entry, name: str) -> None:
    if entry.origin != "built in":
        _guard_forks()
    if entry.cls is None and _to_be_tried(entry):
        _attempt(entry, "cls", lambda: _unless_blocked(name, entry))


def _to_be_tried(entry: Entry) -> bool:
    """Tell whether nothing speaks against it but what had run out when it was tried."""
    return entry.failure is None or ran_out(entry.failure)


def _unless_blocked(name: str, entry: Entry) -> Any:
    if name in blocked():
        raise BackendUnavailableError(f"RAU_BLOCK = {os.environ['RAU_BLOCK']!r} names it")
    return entry.load()


class _BeingLoaded(BackendUnavailableError):
    """What a backend hears that asks for itself."""


def _attempt(entry: Entry, part: str, load: Callable[[], Any]) -> None:
    """Load a part of an entry, and note there what goes wrong: a plugin may do anything while it is loaded.

    All in one function: an interrupt on the way into or out of a context manager would leave its note behind for good.
    """
    try:
        entry.failure = _BeingLoaded("it is still being loaded")
        loaded = load()
        if fault := missing_part(loaded):
            raise BackendUnavailableError(f"{shown(loaded)} is not a backend: {fault}")
        entry.failure = None
        setattr(entry, part, loaded)  # last: who sees it takes no lock
    except KeyboardInterrupt:  # the next one tries again
        entry.failure = None
        raise
    except BaseException as error:
        entry.failure = error


@_one_at_a_time
def first_told(entry: Entry) -> bool:
    """Tell whether nobody has been told of an entry's failure before; from now on somebody has."""
    news, entry.told = not entry.told, True
    return news


def missing_part(backend: Any) -> str:
    """Say what a class or an instance lacks to be a backend; empty where it lacks nothing."""
    contract = sys.modules.get("rau.backends")  # dear to import; where nobody has, nobody has a Capabilities
    if contract is None or not isinstance(getattr(backend, "capabilities", None), contract.Capabilities):
        return "it has no attribute `capabilities`, a rau.backends.Capabilities"
    if not callable(getattr(backend, "update", None)):
        return "it has no method `update`"
    return "" if isinstance(getattr(backend, "name", None), str) else "it has no attribute `name`, a str"


def known(name: str) -> bool:
    """Tell whether anybody has declared or registered a name."""
    return find(name) is not None


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
    entry = find(name) if isinstance(name, str) else None
    if entry is None:
        text = f"no backend is called {shown(name)}{asked}; the known ones are {', '.join(names())}."
        if close := nearly(name):
            text += f' Did you mean "{close}"?'
        raise UnknownBackendError(f"{text} {INSTALL_HINT}")
    load(entry, name)
    if entry.failure is not None:
        raise BackendUnavailableError(
            f'backend "{name}" is not available{asked}: {reason_of(entry.failure)}', name=name
        ) from entry.failure
    return entry.instance


def nearly(name: Any) -> str:
    """Return the backend that is called nearly so, by its letters, large or small; empty if none is."""
    import difflib

    close = difflib.get_close_matches(name.lower(), names(), n=1, cutoff=0.75) if isinstance(name, str) else []
    return close[0] if close else ""


def reason_of(failure: BaseException) -> str:
    """Word a failure in one line."""
    try:
        text = " ".join(str(failure).split()) or "no reason given"
    except Exception:
        text = "and it cannot say why"
    return text if isinstance(failure, RauError) else f"{type(failure).__name__}: {text}"


def status() -> list[Status]:
    """Try every backend and return the outcome.

    Returns
    -------
    list of Status
        In the order of :func:`names`.
    """
    for name, entry in list(_scan().items()):
        load(entry, name)
    return standings()


def standings() -> list[Status]:
    """Tell what is known of every backend by its class and by earlier attempts: no instance is made, no library imported."""
    result, entries = [], _scan()
    for name in _in_order(entries):
        entry = entries[name]
        cls = load_class(entry, name)
        state, reason = "not tried", []
        if entry.instance is not None:
            state = "available"
        elif entry.failure is not None:
            state, reason = "blocked" if name in blocked() else "unavailable", [reason_of(entry.failure)]
        elif libraries := _missing_libraries(cls.capabilities.array_types):
            state, reason = "unavailable", [f"it takes arrays of {' or '.join(libraries)}, which is not installed"]
        result.append(Status(name, state == "available", state, "; ".join(reason + entry.notes), entry.origin))
    return result


def _missing_libraries(array_types: tuple[str, ...]) -> list[str]:
    """Libraries of the arrays that a backend takes, where none of them is here."""
    from importlib.util import find_spec  # for messages alone

    libraries = sorted({name.partition(":")[0].partition(".")[0] for name in array_types})
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
        raise UnknownBackendError(f"{shown(backend)} has no name; expected a class attribute `name`, a str.")
    if fault := missing_part(backend):
        raise UnknownBackendError(f"{shown(backend)} is not a backend: {fault}.")
    _take_name(name, backend)


@_one_at_a_time
def _take_name(name: str, backend: Any) -> None:
    entries = _scan()
    if name in entries:
        taken = entries[name].origin
        raise UnknownBackendError(f'the name "{name}" is taken ({taken}); choose another one.')
    entries[name] = Entry("registered", lambda: backend)


@contextmanager
def provisionally(backend: Any) -> Iterator[None]:
    """Make a backend known for the duration of a ``with`` block, in place of any other with its name.

    Parameters
    ----------
    backend : Backend
        An instance, such as a kernel under development that is being checked.
    """
    entries = _scan()
    before = entries.get(backend.name)
    entry = Entry("under test", lambda: backend)
    entry.cls = entry.instance = backend
    entries[backend.name] = entry
    try:
        yield
    finally:
        if before is None:
            del entries[backend.name]
        else:
            entries[backend.name] = before


@_one_at_a_time
def refresh() -> None:
    """Forget what was loaded, what failed and what was registered; entry points are scanned anew on first need."""
    global _entries
    _entries = _built_in()


def array_types() -> set[str]:
    """Types that the known plugins take, as "module:qualname"; imports their modules, makes no instance."""
    types: set[str] = set()
    for name, entry in list(_scan().items()):
        cls = load_class(entry, name)
        if cls is not None:
            types.update(cls.capabilities.array_types)
    return types


def capabilities(name: str) -> Any:
    """Capabilities of a known backend, available here or not; None where its module cannot be imported."""
    entry = find(name)
    cls = None if entry is None else load_class(entry, name)
    return None if cls is None else cls.capabilities
