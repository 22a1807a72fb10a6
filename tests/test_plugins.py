"""Third parties' backends, found by their entry points: what they add, and that the broken ones disturb nobody."""

import sys
import threading
import time

import numpy as np
import pytest
from patience import LIMIT
from states import arguments, bits, sbh, tnd

import rau
from plugins import LOOPBACK, install
from rau import registry
from rau.backends import Capabilities
from rau.config import collect


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on sys.path for distributions, and a registry that has not looked there yet."""
    for name in ("RAU_BACKEND", "RAU_BLOCK"):
        monkeypatch.delenv(name, raising=False)
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    registry.refresh()
    yield tmp_path
    monkeypatch.undo()
    for name in set(sys.modules) - before:
        if name.startswith("rau_"):
            del sys.modules[name]
    registry.refresh()


@pytest.fixture
def loopback(site):
    install(site, "loopback-plugin", {"loopback": "rau_loopback:LoopbackBackend"}, rau_loopback=LOOPBACK)
    import rau_loopback

    return rau_loopback


def status_of(name):
    return next(status for status in registry.status() if status.name == name)


def assert_numpy_is_as_before():
    """Calls on NumPy arrays run as ever, the best of ours takes them, and info tells all."""
    best = next(status.name for status in registry.status() if status.available)
    assert best in ("cython", "numpy")
    found = rau.explain(**arguments())
    assert (found.selected, found.origin) == (best, "automatic")
    assert bits(rau.ring_attention_update(**arguments())) == bits(
        rau.ring_attention_update(**arguments(), backend="numpy")
    )
    with pytest.raises(rau.DTypeError, match="prev_attn_out is of type list"):
        rau.ring_attention_update([1.0], *list(arguments().values())[1:])
    config = collect()
    assert config["choice"] == {"backend": best, "origin": "automatic"}
    assert [one["name"] for one in config["backends"]] == registry.names()


def test_arrays_of_its_own_reach_a_plugin_unasked(loopback):
    given = arguments()
    expected = rau.ring_attention_update(**given)
    wrapped = {name: loopback.Array(array) for name, array in given.items()}
    result = rau.ring_attention_update(**wrapped)
    assert isinstance(result, rau.AttentionState)
    assert [type(part) for part in result] == [loopback.Array] * 3
    assert bits(part.values for part in result) == bits(expected)
    found = rau.explain(**wrapped)
    assert (found.selected, found.origin) == ("loopback", "automatic")
    # Into given arrays, and many states at once.
    out = [loopback.Array(np.zeros_like(part)) for part in expected]
    assert all(mine is its for mine, its in zip(rau.ring_attention_update(**wrapped, out=out), out, strict=True))
    assert bits(part.values for part in out) == bits(expected)
    states = [[loopback.Array(part) for part in sbh(seed=seed)] for seed in (1, 2)]
    merged = rau.merge_states(states)
    assert bits(part.values for part in merged) == bits(expected)
    assert loopback.made == 1
    assert_numpy_is_as_before()


def test_a_plugin_is_listed_with_its_distribution(loopback):
    assert registry.names()[:2] == ["cython", "numpy"]
    assert "loopback" in registry.names()
    assert status_of("loopback") == ("loopback", True, "available", "", "loopback-plugin")


def test_a_plugin_is_not_imported_for_numpy_arrays(site):
    install(site, "loopback-plugin", {"loopback": "rau_loopback:LoopbackBackend"}, rau_loopback=LOOPBACK)
    rau.ring_attention_update(**arguments())
    rau.ring_attention_update(**arguments(), backend="numpy")
    assert "rau_loopback" not in sys.modules


def test_a_plugin_takes_no_arrays_of_others(loopback):
    with pytest.raises(rau.UnsupportedError, match=r"numpy:ndarray is not one of rau_loopback:Array") as caught:
        rau.ring_attention_update(**arguments(), backend="loopback")
    assert "\n  numpy: takes it" in str(caught.value)
    wrapped = {name: loopback.Array(array) for name, array in arguments().items()}
    with pytest.raises(rau.UnsupportedError, match="rau_loopback:Array is not one of numpy:ndarray"):
        rau.ring_attention_update(**wrapped, backend="numpy")


def test_kinds_and_devices_do_not_mix(loopback):
    given = arguments()
    wrapped = {name: loopback.Array(array) for name, array in given.items()}
    with pytest.raises(rau.DTypeError) as caught:
        rau.ring_attention_update(**wrapped | {"cur_attn_out": given["cur_attn_out"]})
    assert str(caught.value) == (
        "ring_attention_update: [array-kind] cur_attn_out is a numpy array and prev_attn_out a rau_loopback:Array one; "
        "expected one kind for all. Convert one of them first."
    )
    elsewhere = loopback.Array(given["cur_softmax_sum"], "loop")
    with pytest.raises(rau.ConstraintError) as caught:
        rau.ring_attention_update(**wrapped | {"cur_softmax_sum": elsewhere})
    assert str(caught.value) == (
        "ring_attention_update: [array-device] cur_softmax_sum is on loop and prev_attn_out on cpu; "
        "expected one device for all. Move one of them first."
    )
    out = [given[name] for name in ("prev_attn_out", "prev_softmax_max")]
    with pytest.raises(rau.ConstraintError) as caught:
        rau.ring_attention_update(**wrapped, out=[*out, elsewhere])
    assert caught.value.rules == ("array-kind", "array-kind", "array-device")
    with pytest.raises(rau.DTypeError, match="softmax_max is a rau_loopback:Array array; expected an array of NumPy, torch or JAX"):
        rau.AttentionState(None, *list(wrapped.values())[1:3]).lse(base="e")


def test_lengths_on_a_device_are_not_read(loopback):
    """Reading them would wait for the device; the blocks are then the kernel's own business."""

    class Far(loopback.Array):
        shape, dtype = (3,), np.dtype("int64")

        def __init__(self):
            self.device = "loop:1"

    given = {name: loopback.Array(array) for name, array in arguments(tnd).items()}
    for order, profile in (("TND", "mindspore"), ("SBH", "portable")):
        lengths = Far()
        problem = rau.explain(
            **given, actual_seq_qlen=lengths, layout="TND", softmax_layout=order, profile=profile
        ).problem
        assert problem.actual_seq_qlen is lengths
        assert (problem.B, problem.S, problem.T) == (2, None, 8)
        assert (problem.blocks is None) == (order == "SBH")


def test_values_that_numpy_cannot_read(loopback):
    given = arguments(tnd)
    wrapped = {name: loopback.Array(array) for name, array in given.items()}
    options = {"layout": "TND", "actual_seq_qlen": [0, 8]}
    with pytest.raises(rau.DTypeError) as caught:
        rau.ring_attention_update(**wrapped, **options, check="values")
    assert str(caught.value) == (
        "[array] NumPy cannot read the values of a rau_loopback:Array array, which are to be checked; "
        'expected it to have __array__. Leave check at "metadata", and pass actual_seq_qlen as a list.'
    )
    with pytest.raises(rau.DTypeError, match="NumPy cannot read the values"):
        rau.ring_attention_update(**wrapped, layout="TND", actual_seq_qlen=loopback.Array(np.array([0, 8])))

    class Readable(loopback.Array):
        def __array__(self, dtype=None, copy=None):
            return self.values

    wrapped = {name: Readable(array) for name, array in given.items()}
    options["actual_seq_qlen"] = Readable(np.array([0, 8]))
    expected = bits(rau.ring_attention_update(**given, layout="TND", actual_seq_qlen=[0, 8]))
    assert bits(part.values for part in rau.ring_attention_update(**wrapped, **options, check="values")) == expected
    given["cur_softmax_sum"][1, 1] = -1
    with pytest.raises(rau.ConstraintError, match=r"cur_softmax_sum\[1, 1, 0\] = -1\.0"):
        rau.ring_attention_update(**wrapped, **options, check="values")


def test_unasked_the_first_in_the_alphabet_takes_an_array_type(loopback):
    """Two plugins that name one type; and one that names NumPy's, in vain."""
    made = {name: type(name, (loopback.LoopbackBackend,), {"name": name}) for name in ("zeta", "alpha")}
    for backend in made.values():
        registry.register(backend)
    wrapped = {name: loopback.Array(array) for name, array in arguments().items()}
    assert rau.explain(**wrapped).selected == "alpha"

    class Greedy(loopback.LoopbackBackend):
        name = "aaa"
        capabilities = registry.get("numpy").capabilities

    registry.register(Greedy)
    assert_numpy_is_as_before()


def test_unasked_one_that_refuses_is_passed_over(loopback):
    """By problem: what the first takes goes to it, before and after what it does not take, also when met again."""
    ran = []

    class Alpha(loopback.LoopbackBackend):
        name = "alpha"
        capabilities = Capabilities(array_types=("rau_loopback:Array",), devices=("cpu", "loop"), max_heads=3)

        def update(self, *call):
            ran.append(self.name)
            return super().update(*call)

    class Beta(Alpha):
        name = "beta"
        capabilities = loopback.LoopbackBackend.capabilities

    registry.register(Alpha)
    registry.register(Beta)
    for heads in (3, 4, 4, 3, 4):
        rau.ring_attention_update(**{name: loopback.Array(array) for name, array in arguments(N=heads).items()})
    assert ran == ["alpha", "beta", "beta", "alpha", "beta"]


def test_a_plugin_that_names_every_type(loopback):
    """A list is no array all the same, nor is None."""

    class Greedy(loopback.LoopbackBackend):
        name = "greedy"
        capabilities = Capabilities(array_types=("builtins:object", "builtins:list", "numpy:ndarray"))

    registry.register(Greedy)
    assert_numpy_is_as_before()
    with pytest.raises(rau.DTypeError, match="prev_attn_out is None"):
        rau.ring_attention_update(**arguments() | {"prev_attn_out": None})


def test_arrays_whose_plugin_is_blocked_or_broken(site, loopback, monkeypatch):
    wrapped = {name: loopback.Array(array) for name, array in arguments().items()}
    monkeypatch.setenv("RAU_BLOCK", "loopback")
    registry.refresh()
    with pytest.raises(rau.DTypeError, match=r"prev_attn_out is of type rau_loopback\.Array; expected an array"):
        rau.ring_attention_update(**wrapped)
    monkeypatch.delenv("RAU_BLOCK")
    registry.refresh()

    def broken(self):
        raise OSError("no device here")

    monkeypatch.setattr(loopback.LoopbackBackend, "__init__", broken)
    with pytest.raises(rau.UnsupportedError, match="loopback: unavailable: OSError: no device here"):
        rau.ring_attention_update(**wrapped)
    assert_numpy_is_as_before()


BROKEN = {
    "import": ("import no_such_framework", "ModuleNotFoundError: No module named 'no_such_framework'"),
    "syntax": ("def", "SyntaxError: "),
    "exit": ("raise SystemExit('I give up')", "SystemExit: I give up"),
    "attribute": ("", "AttributeError: module 'rau_bad' has no attribute 'Bad'"),
    "silent": ("raise RuntimeError", "RuntimeError: no reason given"),
    "construction": (
        LOOPBACK + "\nclass Bad(LoopbackBackend):\n    def __init__(self):\n        raise OSError('no device')\n",
        "OSError: no device"),
    "exit at construction": (
        LOOPBACK + "\nclass Bad(LoopbackBackend):\n    def __init__(self):\n        raise SystemExit\n",
        "SystemExit: no reason given"),
    "no capabilities": ("class Bad:\n    name, update = 'bad', print\n", "it has no attribute `capabilities`"),
    "a function": ("def Bad():\n    pass\n", "it has no attribute `capabilities`, a rau.backends.Capabilities"),
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_plugin_disturbs_nobody(site, how):
    text, reason = BROKEN[how]
    install(site, "bad-plugin", {"bad": "rau_bad:Bad"}, rau_bad=text)
    install(site, "loopback-plugin", {"loopback": "rau_loopback:LoopbackBackend"}, rau_loopback=LOOPBACK)
    status = status_of("bad")
    assert (status.available, status.state, status.origin) == (False, "unavailable", "bad-plugin")
    assert reason in status.reason
    assert "\n" not in status.reason
    with pytest.raises(rau.BackendUnavailableError) as caught:
        rau.ring_attention_update(**arguments(), backend="bad")
    assert str(caught.value) == f'backend "bad" is not available (asked for by backend=): {status.reason}'
    assert caught.value.__cause__ is not None
    assert status_of("loopback").available
    assert_numpy_is_as_before()


def test_a_taken_name(site):
    install(site, "greedy-plugin", {"numpy": "rau_loopback:LoopbackBackend"}, rau_loopback=LOOPBACK)
    note = "also declared by greedy-plugin, which is ignored: the name was taken"
    assert status_of("numpy") == ("numpy", True, "available", note, "built in")
    verdict = next(one for one in rau.explain(**arguments()).verdicts if one.name == "numpy")
    assert str(verdict) == "numpy: within its limits; takes these arrays"
    assert registry.get("numpy").__class__.__module__ == "rau.backends.numpy_"
    assert "rau_loopback" not in sys.modules
    assert_numpy_is_as_before()


def test_one_name_from_two_distributions(site):
    install(site, "b-plugin", {"both": "rau_loopback:LoopbackBackend"}, rau_loopback=LOOPBACK)
    install(site, "a-plugin", {"both": "rau_loopback:LoopbackBackend"})
    status = status_of("both")
    reason = 'a-plugin and b-plugin both declare a backend "both"; uninstall one of them'
    assert status == ("both", False, "unavailable", reason, "a-plugin and b-plugin")
    with pytest.raises(rau.BackendUnavailableError, match="a-plugin and b-plugin both declare"):
        registry.get("both")
    assert "rau_loopback" not in sys.modules
    assert_numpy_is_as_before()


def test_one_distribution_found_twice(site, monkeypatch):
    for folder in (site, site / "again"):
        install(folder, "loopback-plugin", {"loopback": "rau_loopback:LoopbackBackend"}, rau_loopback=LOOPBACK)
    monkeypatch.syspath_prepend(site / "again")
    assert status_of("loopback").available


@pytest.mark.parametrize("text", ["[rau.backends]\nnot an entry\n", "[rau.backends]\nbad = ???\n"])
def test_broken_metadata(site, text):
    install(site, "bad-plugin", text)
    install(site, "loopback-plugin", {"loopback": "rau_loopback:LoopbackBackend"}, rau_loopback=LOOPBACK)
    assert status_of("loopback").available
    assert_numpy_is_as_before()


def test_a_plugin_that_crashes_can_be_blocked(site, monkeypatch):
    install(site, "bad-plugin", {"bad": "rau_bad:Bad"}, rau_bad="import os; os._exit(3)")
    monkeypatch.setenv("RAU_BLOCK", "bad")
    registry.refresh()
    status = status_of("bad")
    assert (status.state, status.reason) == ("blocked", "RAU_BLOCK = 'bad' names it")
    assert_numpy_is_as_before()


def test_many_threads_make_one_instance(loopback, monkeypatch):
    barrier, found = threading.Barrier(8), []
    init = loopback.LoopbackBackend.__init__

    def slowly(self):  # so that each has begun before the first is done
        time.sleep(0.1)
        init(self)

    monkeypatch.setattr(loopback.LoopbackBackend, "__init__", slowly)

    def ask():
        barrier.wait(LIMIT)
        found.append(registry.get("loopback"))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert len(found) == 8
    assert len(set(map(id, found))) == loopback.made == 1


def test_a_plugin_may_look_around_while_it_is_loaded(site):
    """At import and at construction; of itself it hears that it is not there yet."""
    look = "STATUS = [status.reason for status in rau.registry.status() if status.name == 'loopback']"
    text = f"import rau\n{look}\n{LOOPBACK}".replace(
        "        made += 1\n", f"        made += 1\n        global STATUS\n        {look}\n"
    )
    install(site, "loopback-plugin", {"loopback": "rau_loopback:LoopbackBackend"}, rau_loopback=text)
    assert status_of("loopback").available
    import rau_loopback

    assert rau_loopback.made == 1
    assert rau_loopback.STATUS == ["it is still being loaded"]
    assert registry.get("loopback").name == "loopback"
