"""Every adapter against a stand-in for its peer: the call it makes is the documented one, and its axes and base are right."""

import sys
from dataclasses import replace
from itertools import product
from types import ModuleType

import pytest
from adapters import ADAPTERS
from stand_ins import STAND_INS

from rau.testing import check_backend
from rau.testing.cases import Case

# TransformerEngine rounds every partial output to 16 bits, and so does its stand-in: that is no matter of the call.
WIDE = ("transformer-engine", "transformer-engine-thd")


def cases(adapter):
    """Unequal lengths of the axes, so that none can be taken for another; D = 64 is a head dimension that all take."""
    dtypes = ("float32",) if adapter.name in WIDE else adapter.capabilities.dtypes
    for (layout, order), dtype, states, kind in product(
        (("SBH", "TND"), ("BSND", "TND"), ("BNSD", "TND"), ("TND", "TND"), ("TND", "SBH")), dtypes, (2, 3), ("ordinary", "empty")
    ):
        yield Case(
            id=f"call/{layout}-{order}-{dtype}-{states}-{kind}", layout=layout, softmax_layout=order, dtype=dtype, states=states,
            statistics=kind, batch=2, tokens=5, lengths=(2, 3), heads=3, head_dim=64,
        )  # fmt: skip


@pytest.fixture
def standing_in(monkeypatch):
    """A function that puts a stand-in where an adapter looks for its peer, and makes the adapter on the CPU."""

    def make(adapter):
        module, _, _ = adapter.where.partition(":")
        for end in [at for at, letter in enumerate(module) if letter == "."]:
            if module[:end] not in sys.modules:
                monkeypatch.setitem(sys.modules, module[:end], ModuleType(module[:end]))
        its = ModuleType(module)
        vars(its).update(STAND_INS[adapter.name])
        monkeypatch.setitem(sys.modules, module, its)
        monkeypatch.setattr(adapter, "capabilities", replace(adapter.capabilities, devices=("cpu",)))
        return adapter()

    return make


def checked(backend, select="call/*"):
    return check_backend(backend, cases=cases(backend), select=select)


def test_every_adapter_has_a_stand_in():
    assert set(ADAPTERS) == set(STAND_INS)
    assert all(adapter.name == name for name, adapter in ADAPTERS.items())


@pytest.mark.parametrize("name", STAND_INS)
def test_the_call_is_the_documented_one(name, standing_in):
    report = checked(standing_in(ADAPTERS[name]))
    assert report.passed, report.failures[:3]
    assert len(report.succeeded) >= 20


@pytest.mark.parametrize("name", STAND_INS)
@pytest.mark.parametrize("mistake", ["base", "axes"])
def test_a_mistake_is_found(name, mistake, standing_in):
    """An adapter that reads the log-sum-exp to the other base, or with its axes the other way round."""
    right = ADAPTERS[name]
    if mistake == "base":
        base = {"e": "2", "2": "e"}[right.capabilities.lse_base]
        wrong = type("Wrong", (right,), {"capabilities": replace(right.capabilities, lse_base=base)})
    else:
        axes = {"TN": "NT", "NT": "TN", "BNS": "BSN", "BSN": "BNS"}[right.lse_layout]
        wrong = type("Wrong", (right,), {"lse_layout": axes})
    assert not checked(standing_in(wrong), "call/BSND*").passed


@pytest.mark.parametrize(("name", "wrong"), [("natten", {"compile": False}), ("flash-attention-3", {"dtype": None})])
def test_a_wrong_keyword_is_refused(name, wrong, standing_in):
    kernel = standing_in(ADAPTERS[name])._kernel
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        kernel(None, None, **wrong)
