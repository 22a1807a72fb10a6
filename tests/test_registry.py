"""Names, status, selection and its strictness, the environment, and the words of the errors."""

import logging
import subprocess
import sys
import warnings

import numpy as np
import pytest
from patience import LIMIT
from states import arguments, bits, sbh

import rau
from rau import registry
from rau.backends import Backend, Capabilities

HINT = (
    "A third-party backend is found once its distribution is installed alongside ring-attention-update "
    '(entry-point group "rau.backends"), or after rau.registry.register(...).'
)
BEST = next(status.name for status in registry.status() if status.available)  # "cython" where the core is compiled


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """A registry without what other tests put there, and no variable that steers it."""
    for name in ("RAU_BACKEND", "RAU_BLOCK", "RAU_SIMD"):
        monkeypatch.delenv(name, raising=False)
    registry.refresh()
    yield
    monkeypatch.undo()
    registry.refresh()


class Picky(Backend):
    """Takes next to nothing, and returns its inputs."""

    name = "picky"
    capabilities = Capabilities(
        array_types=("numpy:ndarray",), dtypes=("float16",), lanes=(1,), layouts=("TND",), softmax_layouts=("SBH",),
        mixed=False, in_place=False, max_heads=2, max_head_dim=4, head_dim_multiple=3,
    )  # fmt: skip

    def update(self, problem, prev, cur, out):
        return prev


class Echo(Backend):
    """Takes everything that lives on the host."""

    name = "echo"
    capabilities = Capabilities(array_types=("numpy:ndarray",))

    def update(self, problem, prev, cur, out):
        return cur


def who(**options):
    """Name of the backend that runs a call, and where the choice came from."""
    found = rau.explain(**arguments(), **options)
    return found.selected, found.origin


def python(code, **env):
    import os

    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAU_")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=LIMIT, env=kept | env
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---------------------------------------------------------------------------------------------------- names and status


def test_the_built_in_ones():
    assert registry.names()[:2] == ["cython", "numpy"]
    found = {status.name: status for status in registry.status()}
    assert list(found) == registry.names()
    assert found["numpy"] == ("numpy", True, "available", "", "built in")
    assert registry.get("numpy") is registry.get("numpy")
    assert registry.get("numpy").name == "numpy"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cythn", f"no backend is called 'cythn'; the known ones are cython, numpy. Did you mean \"cython\"? {HINT}"),
        ("flash", f"no backend is called 'flash'; the known ones are cython, numpy. {HINT}"),
        ("", f"no backend is called ''; the known ones are cython, numpy. {HINT}"),
        (None, f"no backend is called None; the known ones are cython, numpy. {HINT}"),
        (["numpy"], f"no backend is called ['numpy']; the known ones are cython, numpy. {HINT}"),
    ],
)
def test_unknown_names(name, says):
    def error(call):
        with pytest.raises(rau.UnknownBackendError) as caught:
            call()
        names = ", ".join(registry.names())
        return str(caught.value).replace(f"the known ones are {names}.", "the known ones are cython, numpy.")

    assert error(lambda: registry.get(name)) == says
    by = "(asked for by use_backend)"
    assert error(lambda: rau.use_backend(name).__enter__()) == says.replace(";", f" {by};", 1)
    if isinstance(name, str):
        by = "(asked for by backend=)"
        assert error(lambda: rau.ring_attention_update(**arguments(), backend=name)) == says.replace(";", f" {by};", 1)


@pytest.mark.parametrize(
    "backend", [3, True, object(), ["numpy"], np.zeros(2), Echo], ids=["int", "bool", "object", "list", "array", "class"]
)
def test_what_is_no_backend(backend):
    with pytest.raises(
        rau.UnknownBackendError, match=r"^backend=.* is not a backend: .*; expected a name or an instance\.$"
    ):
        rau.ring_attention_update(**arguments(), backend=backend)


def test_blocked(monkeypatch):
    monkeypatch.setenv("RAU_BLOCK", " cython , nothing")
    registry.refresh()
    assert who() == ("numpy", "automatic")
    status = registry.status()[0]
    assert status == ("cython", False, "blocked", "RAU_BLOCK = ' cython , nothing' names it", "built in")
    with pytest.raises(rau.BackendUnavailableError) as caught:
        rau.ring_attention_update(**arguments(), backend="cython")
    assert str(caught.value) == (
        "backend \"cython\" is not available (asked for by backend=): RAU_BLOCK = ' cython , nothing' names it"
    )
    assert caught.value.name == "cython"
    assert isinstance(caught.value.__cause__, rau.RauError)


def test_all_blocked(monkeypatch):
    monkeypatch.setenv("RAU_BLOCK", "cython,numpy")
    registry.refresh()
    with pytest.raises(rau.UnsupportedError) as caught:
        rau.ring_attention_update(**arguments())
    assert str(caught.value).startswith("no backend takes Problem(layout='SBH', B=2, S=4, T=8, N=3, D=8,")
    for name in ("cython", "numpy"):
        assert f"\n  {name}: blocked: RAU_BLOCK = 'cython,numpy' names it" in str(caught.value)


# ------------------------------------------------------------------------------------------------------------ register


@pytest.mark.parametrize("given", [Echo, Echo()], ids=["class", "instance"])
def test_register(given):
    registry.register(given)
    assert "echo" in registry.names()
    assert registry.status()[registry.names().index("echo")] == ("echo", True, "available", "", "registered")
    cur = sbh(seed=2)
    assert rau.ring_attention_update(*sbh(), *cur, backend="echo").attn_out is cur.attn_out
    assert who() == (BEST, "automatic")  # nobody who does not ask for it notices
    registry.refresh()
    assert "echo" not in registry.names()


def test_register_under_another_name():
    registry.register(Echo, name="mine")
    assert who(backend="mine") == ("echo", "backend=")


@pytest.mark.parametrize("name", ["numpy", "echo"])
def test_register_a_taken_name(name):
    registry.register(Echo)
    with pytest.raises(rau.UnknownBackendError, match=f'^the name "{name}" is taken .*; choose another one.$'):
        registry.register(Echo(), name=name)


class Nameless(Backend):
    capabilities = Echo.capabilities


class Vague:
    name = "vague"
    update = Echo.update


class Idle:
    name, capabilities = "idle", Echo.capabilities


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (Nameless, "has no name; expected a class attribute `name`, a str."),
        (3, "has no name; expected a class attribute `name`, a str."),
        (Vague, "is not a backend: it has no attribute `capabilities`, a rau.backends.Capabilities."),
        (Idle(), "is not a backend: it has no method `update`."),
    ],
)
def test_register_what_is_no_backend(given, says):
    with pytest.raises(rau.UnknownBackendError) as caught:
        registry.register(given)
    assert str(caught.value) == f"{given!r} {says}"


def test_a_constructor_that_fails_is_told_and_remembered():
    calls = []

    class Broken(Echo):
        name = "broken"

        def __init__(self):
            calls.append(1)
            raise OSError("no such\n  device")

    registry.register(Broken)
    for _ in range(2):
        with pytest.raises(rau.BackendUnavailableError) as caught:
            registry.get("broken")
    assert str(caught.value) == 'backend "broken" is not available: OSError: no such device'
    assert isinstance(caught.value.__cause__, OSError)
    assert calls == [1]


def test_an_interrupted_constructor_is_tried_again():
    class Slow(Echo):
        name = "slow"
        made = 0

        def __init__(self):
            Slow.made += 1
            if Slow.made == 1:
                raise KeyboardInterrupt

    registry.register(Slow)
    with pytest.raises(KeyboardInterrupt):
        registry.get("slow")
    assert registry.get("slow").made == 2


class Alike:
    """Looks like a backend without deriving from Backend: update is the one required method."""

    name, capabilities, update = "alike", Echo.capabilities, Echo.update


def test_a_backend_need_not_derive_from_the_base():
    registry.register(Alike)
    cur = sbh(seed=2)
    assert rau.ring_attention_update(*sbh(), *cur, backend="alike").attn_out is cur.attn_out
    with pytest.raises(
        rau.UnsupportedError, match=r'backend "alike" has no merge; derive it from rau\.backends\.Backend'
    ):
        rau.merge_states([sbh(), cur], backend="alike")


# ----------------------------------------------------------------------------------------------------------- selection


def test_who_wins(monkeypatch):
    for name in ("one", "two", "three"):
        registry.register(type(name, (Echo,), {"name": name}))
    assert who() == (BEST, "automatic")
    monkeypatch.setenv("RAU_BACKEND", "one")
    assert who() == ("one", "RAU_BACKEND")
    with rau.use_backend("two"):
        assert who() == ("two", "use_backend")
        assert who(backend="three") == ("three", "backend=")
        assert who(backend=Echo()) == ("echo", "backend=")
    assert who() == ("one", "RAU_BACKEND")
    monkeypatch.setenv("RAU_BACKEND", "")
    assert who() == (BEST, "automatic")


@pytest.mark.parametrize("merge", [False, True])
def test_one_line_a_call(caplog, merge):
    with caplog.at_level(logging.DEBUG, logger="rau"), rau.use_backend("numpy"):
        rau.merge_states([sbh(), sbh()]) if merge else rau.ring_attention_update(**arguments())
    call = "merge_states" if merge else "ring_attention_update"
    assert caplog.record_tuples == [("rau", logging.DEBUG, f"{call}: backend numpy (use_backend)")]


def test_logging_that_another_thread_is_importing(monkeypatch):
    """A module is in sys.modules before it has what it defines: nobody listens yet, and the next call asks again."""
    monkeypatch.setattr(registry, "_logger", None)
    with monkeypatch.context() as half_way:
        half_way.setitem(sys.modules, "logging", type(sys)("logging"))
        assert bits(rau.ring_attention_update(**arguments())) == bits(rau.ring_attention_update(**arguments()))
    rau.ring_attention_update(**arguments())
    assert registry._logger is logging.getLogger("rau")


def test_a_request_is_strict(monkeypatch):
    registry.register(Picky)
    reasons = (
        "dtype float32 is not one of float16; layout SBH is not one of TND; the number of lanes is 8, not 1; N = 3 > 2; "
        "D = 8 > 4; D = 8 is not a multiple of 3"
    )
    problem = "Problem(layout='SBH', B=2, S=4, T=8, N=3, D=8, lanes=8, float32, K=2, kind='numpy', device='cpu', "
    problem += "profile='mindspore')"

    def error(**options):
        with pytest.raises(rau.UnsupportedError) as caught:
            rau.ring_attention_update(**arguments(), **options)
        first, heading, *lines = str(caught.value).split("\n")
        assert heading == "All backends:"
        assert [line.split(":")[0].strip() for line in lines] == registry.names()
        assert "  numpy: takes it (not tried yet)" in lines
        assert f"  picky: {reasons}" in lines
        return first

    assert error(backend="picky") == f'backend "picky" (asked for by backend=) does not take {problem}: {reasons}.'
    with rau.use_backend("picky"):
        assert error() == f'backend "picky" (asked for by use_backend) does not take {problem}: {reasons}.'
    monkeypatch.setenv("RAU_BACKEND", "picky")
    assert error() == f'backend "picky" (asked for by RAU_BACKEND) does not take {problem}: {reasons}.'
    monkeypatch.setenv("RAU_BACKEND", "cythn")
    with pytest.raises(rau.UnknownBackendError, match=r"^no backend is called 'cythn' \(asked for by RAU_BACKEND\);"):
        rau.ring_attention_update(**arguments())


def test_a_refused_call_writes_nothing():
    registry.register(Picky)
    given = arguments()
    out = [part + 7 for part in sbh()]
    before = bits([*given.values(), *out])
    for backend in ("picky", "nobody", 3):
        with pytest.raises(rau.RauError):
            rau.ring_attention_update(**given, out=out, backend=backend)
    assert bits([*given.values(), *out]) == before


# --------------------------------------------------------------------------------------------------- own interpreters

CALL = """
import numpy as np, rau, sys, warnings
out, stats = np.ones((4, 1, 16), np.float32), np.ones((1, 2, 4, 8), np.float32)
"""


def test_host_arrays_scan_no_entry_points():
    code = (
        CALL
        + "rau.ring_attention_update(out, stats, stats, out, stats, stats); print('importlib.metadata' in sys.modules)"
    )
    assert python(code, **({} if BEST == "cython" else {"RAU_BLOCK": "cython"})).split() == ["False"]


@pytest.mark.parametrize("env", [{}, {"RAU_BLOCK": "cython"}, {"RAU_BACKEND": "numpy"}], ids=str)
def test_a_missing_core_is_told_once(env):
    code = """
sys.modules["rau._core"] = None
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    for _ in range(3):
        rau.merge_states([(out, stats, stats)] * 2)
    rau.ring_attention_update(out, stats, stats, out, stats, stats)
print(len(told))
for one in told:
    print(one.category.__name__, one.filename, one.message)
"""
    # Before rau is imported, so that the address of an array is found without the core as well.
    code = "import sys; sys.modules['rau._core'] = None\n" + CALL + code
    count, *lines = python(code, **env).splitlines()
    if env:
        assert (count, lines) == ("0", [])
    else:
        assert count == "1"
        assert lines[0].startswith(
            "RuntimeWarning <string> rau runs on NumPy, several times slower but with the same bits: the compiled core "
            "rau._core is missing"
        )


@pytest.mark.skipif(BEST != "cython", reason="RAU_SIMD is the compiled core's")
def test_a_wrong_instruction_set_is_told():
    code = (
        CALL
        + """
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    rau.ring_attention_update(out, stats, stats, out, stats, stats)
print(*(one.message for one in told))
"""
    )
    assert "RAU_SIMD = 'avx3': no version 'avx3'; this processor and build have baseline" in python(
        code, RAU_SIMD="avx3"
    )


def test_refresh_forgets_the_warning(monkeypatch):
    monkeypatch.setitem(sys.modules, "rau._core", None)
    monkeypatch.delattr(rau, "_core", raising=False)
    for _ in range(2):
        registry.refresh()
        with pytest.warns(RuntimeWarning, match="rau runs on NumPy") as told:
            rau.ring_attention_update(**arguments())
        assert [one.filename for one in told] == [__file__]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            rau.ring_attention_update(**arguments())
