"""A process of its own for what is under test: whatever ends it, this one goes on and says so.

The rule of this room: it knows nothing of checks and cases. A function and its arguments cross the pipe, and what it returns
comes back, which should be small. In the place of a backend its number crosses: over there stands an instance of that side's.
"""

from __future__ import annotations

import faulthandler
import io
import multiprocessing
import os
import pickle
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from rau.errors import BackendUnavailableError, RauError
from rau.testing.under_test import described, load, write_out

T = TypeVar("T")
PATIENCE = 10  # answers in a row that fail to come: then no more are asked for
LONG = 300.0  # seconds, for what is no case: to load a backend, which may compile
_LAST_WORDS = 5.0  # seconds in which a process that hangs has to write where


class NoAnswer(Exception):
    """What ran did not return: it crashed, hung, or ended its process; `weight` counts towards `PATIENCE`."""

    def __init__(self, told: str, weight: int = 1) -> None:
        super().__init__(told)
        self.weight = weight


class Here:
    """This process: what runs in it may end it, and a debugger sees it."""

    def call(self, function: Callable[..., T], *arguments: Any, seconds: float = 0.0) -> T:
        """Call a function, however long it takes."""
        return function(*arguments)


class Patience:
    """Asks one thing after another in a place, until too many answers in a row have failed to come."""

    def __init__(self, place: Here | Apart) -> None:
        self._place, self._lost = place, 0

    @property
    def gone(self) -> bool:
        """Whether nothing more is asked."""
        return self._lost >= PATIENCE

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function there; NoAnswer if it does not return, or is not called any more."""
        if self.gone:
            raise NoAnswer("not run after so many crashes in a row")
        try:
            answer = self._place.call(function, *arguments)
        except NoAnswer as lost:
            self._lost += lost.weight
            raise
        self._lost = 0
        return answer


class Apart:
    """A process in which backends are loaded, and loaded again when it has died; a context that ends it.

    Attributes
    ----------
    backends : sequence of Backend
        This side's own instances, in the order of their names, whose places the other side's take. To be set by whoever
        loads them, which is safe once the constructor has returned.
    """

    def __init__(self, names: Sequence[str], timeout: float) -> None:
        self.backends: Sequence[Any] = ()
        self._names, self._timeout = tuple(names), timeout
        self._process: SpawnProcess | None = None
        try:
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process is not None:
            self._kill()

    def call(self, function: Callable[..., T], *arguments: Any, seconds: float = 0.0) -> T:
        """Call a function over there, and return what it returns; NoAnswer if it does not, in `seconds` or the timeout."""
        if self._process is None:
            try:
                self._start()
            except BackendUnavailableError as error:
                raise NoAnswer(f"cannot be loaded again: {error}") from error
        try:
            self._connection.send_bytes(_packed((function, arguments), self.backends))
        except OSError as error:  # it had answered, and died of what it was asked before
            raise self._ended() from error
        problem, answer = self._receive(seconds or self._timeout)
        if problem:
            raise NoAnswer(problem)
        return answer

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._words = tempfile.TemporaryFile()  # no pipe: who fills one that nobody reads from waits, and does not die
        their_words = Connection(os.dup(self._words.fileno()), readable=False)
        process = context.Process(target=_serve, args=(theirs, their_words, self._names))
        # Ctrl-C at a terminal reaches all of its processes; this one hears it, and ends the other.
        resource_tracker.ensure_running()  # else it is started on the way, and unblocks the signal
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        who = " or ".join(map(repr, self._names))
        try:
            process.start()
        except OSError as error:  # the working folder is gone, for example
            for each in (self._connection, self._words, theirs, their_words):
                each.close()
            raise BackendUnavailableError(f"{who}: no process can be started for it: {error}") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._process = process
        theirs.close()  # or its end would not be noticed
        their_words.close()
        try:
            problem, _ = self._receive(LONG)
        except NoAnswer as lost:
            raise BackendUnavailableError(f"{who}: while it was loaded: {lost}") from lost
        if problem:
            raise BackendUnavailableError(problem)

    def _receive(self, seconds: float) -> Any:
        assert self._process is not None
        try:
            if not wait([self._connection, self._process.sentinel], seconds):
                raise self._ended(f"hung: no answer within {seconds:g} s{' (--timeout)' * (seconds == self._timeout)}")
            return _unpacked(self._connection.recv_bytes(), self.backends)
        except (EOFError, OSError) as error:
            raise self._ended() from error
        except KeyboardInterrupt:
            self._kill()  # it would answer what nobody asks any more
            raise

    def _kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.join()
        self._process = None
        self._words.close()

    def _ended(self, hung: str = "") -> NoAnswer:
        """Word how the process ended, or end it where it hangs, with the kernel's line; the next call starts another one."""
        process, self._process = self._process, None
        assert process is not None and process.pid is not None
        self._connection.close()
        if hung:
            os.kill(process.pid, signal.SIGABRT)  # upon which it writes where it is
        process.join(_LAST_WORDS)
        process.kill()
        process.join()
        status = process.exitcode or 0
        told = hung or (f"crashed: {_signal(-status)}" if status < 0 else f"ended its process, exit status {status}")
        return NoAnswer(told + self._where(), PATIENCE // 2 if hung else 1)

    def _where(self) -> str:
        """Find the kernel's line in what the process wrote when it died."""
        with self._words:
            self._words.seek(0)
            text = self._words.read().decode(errors="replace")
        text = text.partition("Current thread")[2].partition("\n\n")[0] or text
        frames = re.findall(r'File "(.*)", line (\d+) in (.*)', text)
        theirs = {getattr(sys.modules.get(type(backend).__module__), "__file__", "") for backend in self.backends}
        within = [frame for frame in frames if frame[0] in theirs]
        if not frames:
            return ""
        file, line, name = (within or frames)[0]
        outside = "" if within or not theirs else ": outside of the kernel, which may have written beside its arrays before"
        return f" ({Path(file).name}:{line}, in {name}{outside})"


def _signal(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
    return f"{name} ({signal.strsignal(number)})"


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, backends: Sequence[Any]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._numbers = {id(backend): number for number, backend in enumerate(backends)}

    def persistent_id(self, value: Any) -> int | None:
        return self._numbers.get(id(value))


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, backends: Sequence[Any]) -> None:
        super().__init__(file)
        self._backends = backends

    def persistent_load(self, number: int) -> Any:
        return self._backends[number]


def _packed(value: Any, backends: Sequence[Any]) -> bytes:
    message = io.BytesIO()
    _Pickler(message, backends).dump(value)
    return message.getvalue()


def _unpacked(message: bytes, backends: Sequence[Any]) -> Any:
    return _Unpickler(io.BytesIO(message), backends).load()


def _serve(connection: Connection, words: Connection, names: Sequence[str]) -> None:
    """What runs over there: load the backends, then answer until nobody asks any more."""
    os.dup2(2, 1)  # what a kernel prints is not part of anybody's document
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a crash would take the rest along
    faulthandler.enable(words.fileno())
    try:
        backends = [load(name) for name in names]
    except RauError as error:
        connection.send_bytes(_packed((str(error), None), ()))
        return
    connection.send_bytes(_packed(("", None), ()))
    while True:
        try:
            message = connection.recv_bytes()
        except (EOFError, OSError):
            return
        function, arguments = _unpacked(message, backends)
        try:
            answer = "", function(*arguments)
        except BaseException as error:  # of the kernel's: SystemExit, too
            answer = described(error), None
        write_out()
        connection.send_bytes(_packed(answer, backends))
