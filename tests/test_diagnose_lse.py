"""``python -m rau diagnose`` for kernels that keep a log-sum-exp: what is right, and each mistake by its name."""

import json

import numpy as np
import pytest
from lse_kernels import Base2, Guarded, Sigmoid, Weights

from rau import AttentionState, registry
from rau.__main__ import main
from rau.testing.cases import Case, generated
from rau.testing.diagnosis import diagnose
from rau.testing.diagnosis.lse_mistakes import mistakes_with_lse
from rau.testing.diagnosis.steps import Steps
from rau.testing.differential.record import Record
from rau.testing.trial import run_case

MISTAKES = mistakes_with_lse()
TND = {"layout": "TND", "tokens": 40, "lengths": (10, 0, 30), "heads": 3, "head_dim": 32}
CASES = [
    Case(id="sbh", tokens=40, batch=2, heads=3, head_dim=32, statistics="empty"),
    Case(id="bnsd", layout="BNSD", tokens=40, heads=3, head_dim=32, outputs="special", statistics="empty"),
    Case(id="token-major", **TND, dtype="bfloat16", statistics="attention"),
    Case(id="packed", **TND, softmax_layout="SBH", dtype="float16", statistics="huge-gaps"),
    Case(id="hops", tokens=20, heads=3, head_dim=16, states=5, dtype="bfloat16"),
]


class SingleRows(Steps):
    """Rows in float32: the same mistakes, made by somebody whose arithmetic is another."""

    def _read(self, softmax_layout):
        super()._read(softmax_layout)
        self.lanes = tuple(part.astype(np.float32) for part in self.lanes)
        self.maxima, self.sums = (part[..., :1] for part in self.lanes)


def make(case, base, mistake=None, rows=Steps):
    """Numbers of a case, and what comes of them with a mistake, or rightly."""
    numbers = case.fill()
    with np.errstate(all="ignore"):
        plain = rows(case.make(numbers).states, case.lengths_argument(), case.layout, case.softmax_layout).keeping_lse(base)
        return numbers, plain.merge() if mistake is None else MISTAKES[mistake](plain)


# Single rows have natural logarithms: those to base 2 would be rounded once more, in a base that is not the kernel's.
@pytest.mark.parametrize(("rows", "base"), [(Steps, "e"), (Steps, "2"), (SingleRows, "e")])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("name", MISTAKES)
def test_every_mistake_is_named_first(name, case, rows, base):
    numbers, observed = make(case, base, name, rows)
    if observed is None:
        return  # the call leaves no room for it
    diagnosis = diagnose(Record(case, numbers, observed, base))
    if diagnosis.right:
        assert name in diagnosis.invisible
    elif name in diagnosis.invisible:  # only the other arithmetic shows
        assert rows is SingleRows and diagnosis.slight and not diagnosis.recognised
    else:
        assert diagnosis.recognised, str(diagnosis)
        assert name in [candidate.mistake.name for candidate in diagnosis.recognised], str(diagnosis)


# Single rows have natural logarithms: those to base 2 would be rounded once more, in a base that is not the kernel's.
@pytest.mark.parametrize(("rows", "base"), [(Steps, "e"), (Steps, "2"), (SingleRows, "e")])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_right_result_is_given_no_name(case, rows, base):
    diagnosis = diagnose(Record(case, *make(case, base, None, rows), base))
    assert diagnosis.right and not diagnosis.candidates, str(diagnosis)


@pytest.mark.parametrize("nothing", ["batch", "tokens", "heads", "head_dim"])
@pytest.mark.parametrize("layout", ["SBH", "BNSD", "TND"])
def test_nothing_at_all_is_right(layout, nothing):
    sizes = {"batch": 2, "tokens": 3, "heads": 2, "head_dim": 5} | {nothing: 0}
    sizes["head_dim"] *= nothing != "heads"  # N = 0 needs H = 0
    case = Case(id="nothing", layout=layout, **sizes, lengths=(sizes["tokens"], 0))
    assert diagnose(Record(case, *make(case, "e"), "e")).right


class NaturalReadAsBase2(Guarded):
    name = "natural-read-as-base-2"
    exp, log = staticmethod(np.exp2), staticmethod(np.log2)


class Base2ReadAsNatural(Base2):
    name = "base-2-read-as-natural"
    exp, log = staticmethod(np.exp), staticmethod(np.log)


class NaturalLogarithmOfABase2Sum(Base2):
    name = "natural-logarithm-of-a-base-2-sum"
    log = staticmethod(np.log)


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        (NaturalReadAsBase2, "base-2-instead-of-e"),
        (Base2ReadAsNatural, "base-e-instead-of-2"),
        (NaturalLogarithmOfABase2Sum, "logarithm-to-the-other-base"),
    ],
    ids=lambda each: getattr(each, "name", ""),
)
def test_a_mixed_up_base_is_named_on_nine_cases_of_ten(kernel, name):
    """Of all kinds of numbers, sizes and layouts: those on which it is wrong at all."""
    backend, wrong, found, others = kernel(), 0, 0, []
    for case in generated(1, 60):
        numbers = case.fill()
        with registry.provisionally(backend):
            result, _ = run_case(backend, case, numbers)
        diagnosis = diagnose(Record(case, numbers, result, backend.capabilities.lse_base))
        if diagnosis.right or case.statistics == "negative-sums":
            continue
        wrong += 1
        names = [candidate.mistake.name for candidate in diagnosis.recognised]
        found += name in names[:1]
        others += [(case.id, case.statistics, case.states, names)] * (name not in names[:1])
    print(f"{found} of {wrong}", *others, sep="\n")
    assert wrong > 40 and found >= 0.9 * wrong


@pytest.mark.parametrize(
    ("kernel", "theirs"),
    [(Guarded, set()), (Weights, {"empty-sides-not-guarded", "sigmoid-form"}), (Sigmoid, {"empty-sides-not-guarded", "sigmoid-form"})],
    ids=lambda each: getattr(each, "name", ""),
)
def test_no_mistake_is_named_that_a_kernel_does_not_make(kernel, theirs):
    """Two empty sides and what stands behind one: where those alone are, the two forms are alike."""
    backend, names = kernel(), set()
    for case in generated(3, 25):
        numbers = case.fill()
        with registry.provisionally(backend):
            result, _ = run_case(backend, case, numbers)
        if case.statistics != "negative-sums":
            names |= {each.mistake.name for each in diagnose(Record(case, numbers, result, "e")).recognised}
    assert names <= theirs and bool(names) == bool(theirs)


def test_a_file_with_log_sum_exps(tmp_path, capsys):
    """As anybody has them: no max, no sum, and which base they are to."""
    case = Case(id="file", tokens=40, heads=3, head_dim=32)
    numbers, (output, maximum, total) = make(case, "2", "base-e-instead-of-2")
    lse = [state.lse(base="2") for state in (*numbers, AttentionState(output, maximum, total))]
    arrays = dict(zip(("prev_lse", "cur_lse", "lse"), lse, strict=True))
    arrays |= {"prev_attn_out": numbers[0].attn_out, "cur_attn_out": numbers[1].attn_out, "attn_out": output}
    path = str(tmp_path / "lse.npz")
    np.savez(path, **arrays, lse_base="2")
    assert main(["diagnose", path, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["recognised"] == ["base-e-instead-of-2"]
    np.savez(path, **arrays)
    assert main(["diagnose", path]) == 2
    assert 'expected lse_base, "e" or "2"' in capsys.readouterr().err
