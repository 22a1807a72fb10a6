"""What is under test: a backend, however it is named, its arrays, and how its exceptions are worded.

The rule of this room: it finds a backend, gives it arrays of its own and takes them back, and judges nothing about it.
"""

from __future__ import annotations

import ctypes
import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from rau import registry
from rau.errors import BackendUnavailableError, RauError, UnknownBackendError
from rau.state import AttentionState

_NOT_THEIRS = str(Path(__file__).parents[1]), "<string>"  # as dataclasses call their __init__


def write_out() -> None:
    """Write what C still keeps of what a kernel has printed: a process that is killed would take it along."""
    if os.name == "posix":
        ctypes.CDLL(None).fflush(None)


def load(backend: Any) -> Any:
    """Find a backend by name, by "module:Class" (here first, then installed) or by class, or take an instance as it is."""
    if isinstance(backend, str) and (":" in backend or _is_module(backend)):
        module_name, _, class_name = backend.partition(":")
        if module_name.endswith(".py"):
            spelt = module_name.removesuffix(".py").replace("/", ".").replace(os.sep, ".").lstrip(".")
            raise UnknownBackendError(
                f"{backend!r} names a file; expected module:Class, such as {spelt}:{class_name or 'MyKernel'}"
            )
        if "" not in sys.path:
            sys.path.insert(0, "")
        try:
            module = importlib.import_module(module_name)
        except (Exception, SystemExit) as error:
            if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
                raise UnknownBackendError(
                    f"{backend!r}: no module {module_name!r} here or installed; expected module:Class"
                ) from error
            raise BackendUnavailableError(f"{backend!r}: module {module_name!r} cannot be imported: {described(error)}") from error
        backend = getattr(module, class_name, None) if class_name else None
        if backend is None:
            raise UnknownBackendError(_no_such_class(module, class_name))
    elif isinstance(backend, str):
        module_name, _, class_name = backend.rpartition(".")
        if not registry.known(backend) and module_name and _is_module(module_name):
            meant = f"{module_name}:{class_name}"
            raise UnknownBackendError(f"{backend!r} is no backend; expected module:Class. Did you mean {meant}?")
        if not registry.known(backend) and not registry.nearly(backend):
            if not (class_name[:1].isupper() and class_name.isidentifier()):  # else a class, whose module its author knows
                module_name, class_name = backend, "MyKernel"
            if not all(part.isidentifier() for part in module_name.split(".")):
                module_name = "mykernel"
            raise UnknownBackendError(
                f"no backend is called {backend!r}; the known ones are {', '.join(registry.names())}. A class of your own is named "
                f"with its module: {module_name}:{class_name}, if it is in {module_name.replace('.', '/')}.py"
            )
        return registry.get(backend)
    try:
        instance = backend() if isinstance(backend, type) else backend
    except (Exception, SystemExit) as error:
        raise BackendUnavailableError(f"{backend.__qualname__}() failed: {described(error)}") from error
    needed = ("name", "capabilities", "update", "merge", "asarray", "to_numpy", "synchronize")
    missing = [name for name in needed if not hasattr(instance, name)]
    if missing:
        raise UnknownBackendError(
            f"{type(instance).__qualname__} has no {', '.join(missing)}; derive it from rau.backends.Backend"
        )
    if unknown := instance.capabilities.unknown_names():
        raise UnknownBackendError("\n".join([f"{type(instance).__qualname__} declares what does not exist:", *unknown]))
    return instance


def _is_module(name: str) -> bool:
    """Tell whether what is no backend's name is a module or a file here, with its class forgotten."""
    return not registry.known(name) and (name.endswith(".py") or Path(*name.split(".")).with_suffix(".py").is_file())


def _no_such_class(module: ModuleType, name: str) -> str:
    """Say which classes of a module could be meant."""
    classes = [cls.__name__ for cls in vars(module).values() if isinstance(cls, type) and cls.__module__ == module.__name__]
    text = (
        f"module {module.__name__!r} has no class {name!r}" if name else f"{module.__name__!r} is a module; expected module:Class"
    )
    close = difflib.get_close_matches(name.lower(), [each.lower() for each in classes], n=1)
    meant = [each for each in classes if [each.lower()] == close]
    if meant:
        return f"{text}. Did you mean {module.__name__}:{meant[0]}?"
    return f"{text}. It has {', '.join(f'{module.__name__}:{each}' for each in classes) or 'none'}."


def spelled(instances: Sequence[Any]) -> str:
    """Name backends as the command line takes them; empty where the registry knows all of them."""
    known = [_is_registered(instance) for instance in instances]
    classes = [type(instance) for instance in instances]
    return "" if all(known) else ",".join(
        instance.name if registered else f"{cls.__module__}:{cls.__qualname__}"
        for instance, cls, registered in zip(instances, classes, known, strict=True)
    )  # fmt: skip


def _is_registered(instance: Any) -> bool:
    try:
        return registry.get(instance.name) is instance
    except RauError:
        return False


def own_state(backend: Any, state: Sequence[Any]) -> AttentionState:
    """Make the backend's own arrays of a NumPy state, which has to be contiguous for some."""
    return AttentionState(*(backend.asarray(np.ascontiguousarray(part)) for part in state))


def host_state(backend: Any, state: Sequence[Any]) -> AttentionState:
    """Wait for a state of the backend's own arrays, and copy it into NumPy's."""
    backend.synchronize()
    return AttentionState(*(np.array(backend.to_numpy(part)) for part in state))


def described(error: BaseException) -> str:
    """Word an exception, with the place where it was raised: the kernel's own, if it called rau to be told of a mistake."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not frame.filename.startswith(_NOT_THEIRS)] or frames
    place = f" ({Path(theirs[-1].filename).name}:{theirs[-1].lineno}, in {theirs[-1].name})" if theirs else ""
    return f"{type(error).__name__}: {error}{place}"
