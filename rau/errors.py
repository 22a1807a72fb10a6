"""The errors of rau: one small family, so that a single ``except rau.RauError`` catches all of them."""

from __future__ import annotations

import errno
import reprlib


class RauError(Exception):
    """Base of every error that rau raises on purpose."""


class ConstraintError(RauError, RuntimeError):
    """A call that breaks rules of the operator.

    It is a RuntimeError because the operator's reference page promises one. The message lists every
    broken rule; the class of the error is that of the first one, in the validator's order.

    Parameters
    ----------
    message : str
        The text shown to the caller.
    rules : tuple of str, optional
        Ids of the broken rules, such as ``"tnd-head-dim-64"``; see `rau.constraints.RULES`.

    Attributes
    ----------
    rules : tuple of str
        Ids of the broken rules, in the validator's order.
    """

    # No __init__: torch.compile shows the words of exceptions that have none of their own.

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""

    @property
    def rules(self) -> tuple[str, ...]:
        return self.args[1] if len(self.args) > 1 else ()


class ShapeError(ConstraintError, ValueError):
    """A rank, length, stride or overlap that the operator cannot work with."""


class LayoutError(ConstraintError, ValueError):
    """A layout that does not exist, or that the chosen profile does not have."""


class DTypeError(ConstraintError, TypeError):
    """Something that is not an array, or an array of a dtype that the operator does not take."""


class OptionError(ConstraintError, ValueError):
    """An option (``profile``, ``check``, ``base``, ``to``) with a value that does not exist."""


class UnknownBackendError(RauError, ValueError):
    """A backend name that is not registered."""


class BackendUnavailableError(RauError, ImportError):
    """A backend that is known but cannot be used here; the cause is chained."""


class UnsupportedError(RauError, NotImplementedError):
    """A valid call that the requested backend, or every backend, cannot run."""


class LostRankError(RauError, ConnectionError):
    """Another rank of a distributed call is gone, or was silent for too long."""


def ran_out(error: BaseException | None) -> bool:
    """Tell whether an error, or what caused it, says no more than that memory, stack or file descriptors had run out.

    What failed so may succeed the next time: nobody keeps it.

    Examples
    --------
    >>> ran_out(OSError(errno.EMFILE, "Too many open files")), ran_out(OSError(errno.ENOENT, "No such file"))
    (True, False)
    """
    met: set[int] = set()
    while error is not None and id(error) not in met:
        if isinstance(error, (MemoryError, RecursionError)):
            return True
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            return True
        met.add(id(error))
        error = error.__cause__
    return False


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 120
_repr.maxlevel = 3


def shown(value: object) -> str:
    """Show what somebody passed in a message: briefly, and whatever its own repr does.

    Examples
    --------
    >>> shown("SHB"), shown([[[[[1]]]]])
    ("'SHB'", '[[[...]]]')
    """
    try:
        return _repr.repr(value)
    except Exception:  # of its own making, or too deep
        return f"<{type(value).__name__}, which has no repr>"
