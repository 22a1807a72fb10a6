"""explain: who would run a call, and every reason against the others, on a laptop too."""

import subprocess
import sys

import numpy as np
import pytest
from states import NAMES, arguments, bits, tnd

import rau
from rau import registry
from rau.backends import Backend, Capabilities
from rau.errors import UnknownBackendError, UnsupportedError


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    for name in ("RAU_BACKEND", "RAU_BLOCK"):
        monkeypatch.delenv(name, raising=False)
    registry.refresh()
    yield
    monkeypatch.undo()
    registry.refresh()


class Chip(Backend):
    """An accelerator's backend with limits of its own; it cannot be used here."""

    name = "chip"
    capabilities = Capabilities(
        array_types=("chip:Tensor",), devices=("chip",), dtypes=("float16", "float32"), max_heads=2,
        head_dim_multiple=16, in_place=False, layouts=("SBH", "TND"), softmax_layouts=("SBH",), mixed=False, lanes=(8,),
    )  # fmt: skip

    def __init__(self):
        raise OSError("no chip here")

    def update(self, problem, prev, cur, out):
        raise AssertionError("explain runs nothing")


def verdict(name, **given):
    return next(one for one in rau.explain(**given).verdicts if one.name == name)


def test_limits_are_judged_apart_from_arrays_and_device():
    registry.register(Chip)
    found = verdict("chip", **arguments())
    assert found.limits == ["N = 3 > 2", "D = 8 is not a multiple of 16"]
    assert found.arrays == ["numpy:ndarray is not one of chip:Tensor", "device cpu is not one of chip"]
    assert found.unavailable == "it takes arrays of chip, which is not installed"
    assert rau.explain(**arguments(), backend="chip").selected is None  # named, it is tried
    found = verdict("chip", **arguments())
    assert str(found) == (
        "chip: N = 3 > 2; D = 8 is not a multiple of 16; numpy:ndarray is not one of chip:Tensor; "
        "device cpu is not one of chip; not available: OSError: no chip here"
    )
    found = verdict("chip", **arguments(N=2, D=16))
    assert found.limits == []
    assert str(found).startswith("chip: within its limits; numpy:ndarray")


@pytest.mark.parametrize(
    ("given", "limits"),
    [
        (lambda: arguments(N=1, D=16, dtype="float64") | {"profile": "portable"},
         ["dtype float64 is not one of float16, float32"]),
        (lambda: arguments(N=1, D=16) | {"cur_attn_out": np.zeros((4, 2, 16), "f2"), "profile": "portable"},
         ["it does not merge float16 into float32"]),
        (lambda: arguments(N=1, D=16, lanes=1) | {"profile": "portable"},
             ["the number of lanes is 1, not 8: AttentionState.from_lse(..., lanes=8) makes 8"]),
        (lambda: dict.fromkeys(NAMES, np.ones((2, 1, 8, 16), "f4")[..., :8]) | {NAMES[0]: np.ones((2, 1, 8, 16), "f4"),
         NAMES[3]: np.ones((2, 1, 8, 16), "f4"), "layout": "BNSD", "profile": "portable"},
         ["layout BNSD is not one of SBH, TND"]),
        (lambda: arguments(tnd) | {"layout": "TND", "actual_seq_qlen": [0, 8]}, ["softmax_layout TND is not one of SBH"]),
        (lambda: (lambda a: a | {"out": [a[name] for name in NAMES[:3]]})(arguments(N=1, D=16)),
         ["it does not write over its inputs"]),
    ],
)  # fmt: skip
def test_every_limit_says_what_it_found(given, limits):
    registry.register(Chip)
    assert verdict("chip", **given()).limits == limits


def test_what_it_returns():
    found = rau.explain(**arguments(), backend="numpy")
    assert (found.selected, found.origin, found.failure) == ("numpy", "backend=", "")
    assert [one.name for one in found.verdicts] == registry.names()
    assert verdict("numpy", **arguments()) == ("numpy", [], [], "", True)
    assert (found.problem.layout, found.problem.S, found.problem.B, found.problem.N, found.problem.D) == (
        "SBH",
        4,
        2,
        3,
        8,
    )
    first, second, *rest = str(found).split("\n")
    assert first == repr(found.problem)
    assert second == "runs on numpy (backend=)"
    assert rest == [f"  {one}" for one in found.verdicts]
    assert "  numpy: within its limits; takes these arrays" in rest


def test_the_problem_in_words():
    found = rau.explain(**arguments())
    assert repr(found.problem) == (
        "Problem(layout='SBH', B=2, S=4, T=8, N=3, D=8, lanes=8, float32, K=2, kind='numpy', device='cpu', "
        "profile='mindspore')"
    )
    given = arguments(tnd) | {"cur_attn_out": tnd(dtype="float16").attn_out}
    found = rau.explain(**given, layout="TND", actual_seq_qlen=[0, 3, 8], softmax_layout="SBH", profile="portable")
    assert repr(found.problem) == (
        "Problem(layout='TND', softmax_layout='SBH', B=2, S=5, T=8, N=2, D=64, lanes=8, float16 into float32, K=2, "
        "kind='numpy', device='cpu', profile='portable')"
    )
    assert found.problem.blocks is found.problem.blocks  # made once


def test_a_call_that_would_fail():
    registry.register(Chip)
    found = rau.explain(**arguments(), backend="chip")
    assert (found.selected, found.origin) == (None, "backend=")
    assert found.failure == 'backend "chip" is not available (asked for by backend=): OSError: no chip here'
    assert str(found).split("\n")[1] == f"fails: {found.failure}"
    found = rau.explain(**arguments(), backend="chop")
    assert found.selected is None
    assert 'Did you mean "chip"?' in found.failure
    with rau.use_backend("chip"):
        assert rau.explain(**arguments()).origin == "use_backend"


def test_a_backend_whose_module_cannot_be_imported(monkeypatch):
    monkeypatch.setenv("RAU_BLOCK", "numpy")
    registry.refresh()
    found = verdict("numpy", **arguments())
    assert found == ("numpy", None, None, "RAU_BLOCK = 'numpy' names it", True)
    assert str(found) == "numpy: not available: RAU_BLOCK = 'numpy' names it"


def test_nobody_makes_an_instance_to_explain_or_to_word_an_error():
    made = []

    class Takes(Backend):
        name, capabilities = "takes", Capabilities(array_types=("numpy:ndarray",))

        def __init__(self):
            made.append(self.name)

    class Refuses(Takes):
        name, capabilities = "refuses", Capabilities(array_types=("numpy:ndarray",), layouts=("TND",))

    registry.register(Takes)
    registry.register(Refuses)
    assert str(verdict("takes", **arguments())) == "takes: within its limits; takes these arrays; not tried yet"
    refused = r"refuses: layout SBH is not one of TND\n  takes: takes it \(not tried yet\)"
    with pytest.raises(UnsupportedError, match=refused):
        rau.ring_attention_update(**arguments(), backend="refuses")
    assert made == ["refuses"]  # which was named
    with pytest.raises(UnknownBackendError, match="the known ones are .*takes"):
        rau.ring_attention_update(**arguments(), backend="tales")
    assert made == ["refuses"]
    registry.status()  # asks for all of them
    assert made == ["refuses", "takes"]


def test_torch_is_not_imported_to_explain_or_to_word_an_error():
    code = """
import sys, numpy as np, rau
from rau.backends import Backend, Capabilities

class Refuses(Backend):
    name, capabilities = "refuses", Capabilities(array_types=("numpy:ndarray",), layouts=("TND",))

rau.registry.register(Refuses)
state = np.ones((2, 1, 4), "f4"), np.ones((1, 1, 2, 8), "f4"), np.ones((1, 1, 2, 8), "f4")
said = str(rau.explain(*state, *state))
for options in {"backend": "refuses"}, {"backend": "thorch"}, {"layout": "TND"}:
    try:
        rau.ring_attention_update(*state, *state, **options)
    except rau.RauError as error:
        said += str(error)
assert "torch: " in said and "layout SBH is not one of TND" in said and "Did you mean" in said and "(T, N, 8)" in said, said
assert not {"torch", "triton", "mindspore"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_nothing_is_run_and_nothing_written():
    given = arguments()
    out = [np.full_like(given[name], 7) for name in NAMES[:3]]
    before = bits([*given.values(), *out])
    rau.explain(**given, out=out)
    assert bits([*given.values(), *out]) == before


def test_explain_refuses_what_the_call_refuses():
    """Every bad call: test_errors.py."""
    with pytest.raises(rau.ShapeError, match=r"^explain: \[rank\] prev_attn_out"):
        rau.explain(**arguments() | {"prev_attn_out": np.zeros((), "f4")})


def test_a_merge_is_explained():
    state = [arguments()[name] for name in NAMES[:3]]
    found = rau.explain([state] * 3, backend="numpy")
    assert (found.selected, found.origin, found.problem.K, found.problem.profile) == ("numpy", "backend=", 3, "portable")
    stacked = [np.stack([part] * 5) for part in state]
    assert rau.explain(stacked).problem.K == 5
    rows = np.zeros((4, 2, 8), "f4")
    in_order = rau.explain([(rows, rows, rows)] * 2, [0, 1, 4], "TND").problem  # as merge_states takes them
    assert (in_order.layout, in_order.actual_seq_qlen.tolist()) == ("TND", [0, 1, 4])
    with pytest.raises(rau.ShapeError, match=r"explain: \[shape-match\] states\[1\].attn_out has shape"):
        rau.explain([state, [part[:-1] if part is state[0] else part for part in state]])
    with pytest.raises(rau.LayoutError, match='profile "mindspore" knows "SBH" and "TND" only'):
        rau.explain([state], layout="BSND", profile="mindspore")


def test_a_running_state_is_explained():
    ring = rau.StreamingMerge(backend="numpy")
    with pytest.raises(rau.ShapeError, match="explain: .first-update. there is no state yet"):
        rau.explain(ring)
    ring.update(*(arguments()[name] for name in NAMES[:3]))
    found = rau.explain(ring)
    assert (found.selected, found.origin, found.problem.S, found.problem.K) == ("numpy", "backend=", 4, 2)
    assert repr([found]) == f"[{found}]" and repr(found.verdicts[0]) == str(found.verdicts[0])
