"""``python -m rau diagnose`` for kernels that keep a log-sum-exp: what is right, and each mistake by its name."""

import json
from itertools import islice

import numpy as np
import pytest
from lse_kernels import Base2, Guarded, Sigmoid, Weights

from rau import AttentionState, registry
from rau.__main__ import main
from rau.testing.cases import Case, generated
from rau.testing.diagnosis import diagnose, mistakes
from rau.testing.diagnosis.lse_mistakes import mistakes_with_lse
from rau.testing.diagnosis.steps import Steps
from rau.testing.differential import run_differential, run_recorded
from rau.testing.differential.record import Record, read_record, write_record
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


# The kernel's own arithmetic on every case, and another base or other rows beside it.
# Single rows have natural logarithms: those to base 2 would be rounded once more, in a base that is not the kernel's.
OTHER = {"sbh": (Steps, "2"), "packed": (Steps, "2")}
MADE = [(case, *kind) for case in CASES for kind in ((Steps, "e"), OTHER.get(case.id, (SingleRows, "e")))]
IDS = [f"{case.id}-{rows.__name__}-{base}" for case, rows, base in MADE]


@pytest.mark.parametrize(("case", "rows", "base"), MADE, ids=IDS)
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


def small(seed, count):
    """Generated cases but the largest, which take most of the time and show no more."""

    def elements(case):
        return case.batch * case.tokens * case.heads * case.head_dim * case.states

    return islice((case for case in generated(seed, 2 * count) if elements(case) < 20_000), count)


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
    for case in small(1, 30):
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
    assert wrong > 20 and found >= 0.9 * wrong


@pytest.mark.parametrize(
    ("kernel", "theirs"),
    [
        (Guarded, set()),
        (Weights, {"empty-sides-not-guarded", "sigmoid-form"}),
        (Sigmoid, {"empty-sides-not-guarded", "sigmoid-form"}),
    ],
    ids=lambda each: getattr(each, "name", ""),
)
def test_no_mistake_is_named_that_a_kernel_does_not_make(kernel, theirs):
    """Two empty sides and what stands behind one: where those alone are, the two forms are alike."""
    backend, names = kernel(), set()
    for case in small(3, 25):
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


# What is not promised


def test_a_kernel_is_held_to_what_it_promises(tmp_path, capsys):
    """Its file says what it does not; one that says nothing, as all once did, is of a kernel that promises everything."""
    case = Case(id="promises", tokens=40, heads=3, head_dim=32, statistics="empty", outputs="special")
    numbers, without = case.fill(), Sigmoid.capabilities.unpromised
    with registry.provisionally(Sigmoid()):
        result, _ = run_case(Sigmoid(), case, numbers)
    path = str(tmp_path / "sigmoid.npz")
    write_record(path, case, numbers, result, "e")
    assert main(["diagnose", path]) == 1 and run_recorded(read_record(path), []).wrong
    assert "sigmoid-form" in capsys.readouterr().out
    write_record(path, case, numbers, result, "e", without)
    assert main(["diagnose", path]) == 0 and not run_recorded(read_record(path), []).wrong
    assert f"not held to {', '.join(without)}, which the kernel does not promise" in capsys.readouterr().out
    with np.load(path) as file:
        np.savez(path, **{**file, "unpromised": "payloads"})
    assert main(["diagnose", path]) == 2
    assert "unpromised names 'payloads'; expected some of one-empty, " in capsys.readouterr().err


class SigmoidRoundsStatistics(Sigmoid):
    name = "sigmoid-rounds-statistics"

    def merge_lse(self, prev_out, prev_lse, cur_out, cur_lse):
        halves = (np.float32(np.float16(lse)) for lse in (prev_lse, cur_lse))
        out, lse = super().merge_lse(prev_out, next(halves), cur_out, next(halves))
        return out, np.float32(np.float16(lse))


def test_the_harness_writes_down_what_a_kernel_does_not_promise(tmp_path):
    case = Case(id="written", tokens=40, heads=3, head_dim=32, statistics="empty")
    (finding,) = run_differential([SigmoidRoundsStatistics], [case], folder=tmp_path).findings
    recorded = read_record(finding.file)
    assert recorded.unpromised == Sigmoid.capabilities.unpromised
    assert [each.mistake.name for each in diagnose(recorded).recognised] == ["statistics-in-float16"]


def test_a_mistake_beside_what_is_not_promised_accounts_for_everything():
    """Of a kernel that keeps maximum and sum: rows of which nothing is asked, the maximum neither, speak for no mistake."""
    case = Case(id="beside", tokens=40, heads=3, head_dim=32, statistics="empty")
    numbers = case.fill()
    observed = mistakes.MISTAKES["sums-left-out"](Steps(numbers, None, case.layout, case.softmax_layout))
    nothing = (observed.softmax_sum == 0)[..., 0]
    assert nothing.any()
    observed.softmax_max[nothing] = observed.softmax_sum[nothing] = np.nan
    (best,) = diagnose(Record(case, numbers, observed, "", ("two-empty",))).recognised
    assert (best.mistake.name, best.misfit, best.everything) == ("sums-left-out", 0, True)
    (best,) = diagnose(Record(case, numbers, observed)).recognised
    assert not best.everything
