"""Hostile and unlucky callers: what is checked is what is used, and everything else is an error that says so.

Each test fails on a version before the fault was mended. What can end a process runs in one of its own.
"""

import asyncio
import copy
import gc
import importlib.metadata
import logging
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided
from patience import LIMIT
from states import sbh, tnd

import rau
from rau import plugins, registry
from rau.backends import Backend, Capabilities
from rau.constraints import cache
from rau.testing import same_bits
from rau.testing.under_test import load

HERE = [status.name for status in registry.status() if status.available]
HOST = [name for name in ("cython", "numpy") if name in HERE]
needs_core = pytest.mark.skipif("cython" not in HERE, reason="no compiled core")

STATE = """
import numpy as np
def state(S=4, N=2, D=8, layout="SBH", seed=0):
    rng = np.random.default_rng(seed)
    attn, stats = ((S, N, D), (S, N, 1)) if layout == "TND" else ((S, 1, N * D), (1, N, S, 1))
    numbers = rng.standard_normal(stats), rng.uniform(1, 9, stats)
    return [rng.standard_normal(attn).astype("f4"), *(np.repeat(x.astype("f4"), 8, -1) for x in numbers)]
"""


def alone(code, **environment):
    """Run code in a process of its own; return its exit status and what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STATE + textwrap.dedent(code)], capture_output=True, text=True, timeout=LIMIT,
        env=os.environ | environment,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def fresh_registry():
    registry.refresh()
    yield
    registry.refresh()


class Answers(Backend):
    """Returns whatever it was made to return."""

    name, capabilities = "answers", Capabilities(array_types=("numpy:ndarray",))

    def __init__(self, answer):
        self.answer = answer

    def update(self, problem, prev, cur, out):
        return self.answer(problem, prev, cur, out) if callable(self.answer) else self.answer


# ------------------------------------------------------------------------------------------------------------- memory


def test_lengths_are_copied_before_they_are_checked():
    """A thread that writes to them meanwhile would otherwise send a kernel out of bounds."""
    prev, cur = tnd(), tnd(seed=1)
    lengths = np.array([0, 3, 8])
    seen = []

    def spoil(problem, prev, cur, out):
        lengths[1] = 1 << 50
        seen.append(problem.actual_seq_qlen.tolist())
        return rau.AttentionState(*prev)

    rau.ring_attention_update(*prev, *cur, lengths, "TND", softmax_layout="SBH", profile="portable", backend=Answers(spoil))
    assert seen == [[0, 3, 8]]


@pytest.mark.parametrize("backend", HOST)
def test_a_thread_that_writes_to_the_lengths(backend):
    status, text = alone(f"""
        import threading, time, rau
        prev, cur, out = (state(3000, 8, 16, "TND", seed) for seed in range(3))
        lengths = np.arange(3001); good, bad = lengths.copy(), lengths.copy(); bad[1:-1] = 1 << 50
        def spoil():
            while True:
                lengths[:] = bad; time.sleep(0.0002); lengths[:] = good; time.sleep(0.0005)
        threading.Thread(target=spoil, daemon=True).start()
        done = tried = 0
        while done < 100 or tried < 2000:
            tried += 1
            try:
                rau.ring_attention_update(*prev, *cur, lengths, "TND", softmax_layout="SBH", profile="portable", out=out,
                                          backend="{backend}")
                done += 1
            except rau.ConstraintError:
                pass
        print("good")
    """)  # fmt: skip
    assert (status, text) == (0, "good\n")


class Lies(np.ndarray):
    """Says of itself what is not so."""

    shape = property(lambda self: (4000, 1, 16000))
    flags = property(lambda self: SimpleNamespace(c_contiguous=True, aligned=True, writeable=True))


def test_a_subclass_of_ndarray_is_not_believed():
    prev, cur = sbh(), sbh(seed=1)
    right = rau.ring_attention_update(*prev, *cur)
    given = [part.view(Lies) for part in (*prev, *cur)]
    assert same_bits(rau.ring_attention_update(*given), right) == []
    frozen = bytes(prev.attn_out.nbytes)
    out = [np.frombuffer(frozen, np.float32).view(Lies), np.empty_like(prev[1]), np.empty_like(prev[2])]
    out[0] = np.ndarray.reshape(out[0], prev.attn_out.shape)
    with pytest.raises(rau.ShapeError, match="out.attn_out is read-only"):
        rau.ring_attention_update(*prev, *cur, out=out)
    assert not any(frozen)


def test_a_subclass_that_is_written_into_comes_back_itself():
    class Named(np.ndarray):
        pass

    prev, cur = sbh(), sbh(seed=1)
    out = [np.empty_like(part).view(Named) for part in prev]
    result = rau.ring_attention_update(*prev, *cur, out=out)
    assert all(mine is its for mine, its in zip(out, result, strict=True))
    assert same_bits([np.asarray(part) for part in out], rau.ring_attention_update(*prev, *cur)) == []


@needs_core
@pytest.mark.parametrize(
    ("shrunk", "call"),
    [
        ("prev[0].resize((1, 1, 1), refcheck=False)", 'rau.ring_attention_update(*prev, *cur, backend="cython")'),
        # As many lanes are counted where none are written.
        ("cur[2].resize((1, 2, 40_000, 1), refcheck=False)",
         'rau.merge_states([prev, cur], statistics=False, backend="cython")'),
    ],
)  # fmt: skip
def test_an_array_that_is_resized_after_it_was_checked(shrunk, call):
    """By a log handler here, which runs between check and use."""
    code = f"""
        import logging, rau
        prev, cur = state(40_000, 2, 64), state(40_000, 2, 64, seed=1)
        class Handler(logging.Handler):
            def emit(self, record):
                {shrunk}
        logging.getLogger("rau").setLevel(logging.DEBUG); logging.getLogger("rau").addHandler(Handler())
        try:
            {call}
        except ValueError as error:
            print(error)
    """
    status, text = alone(code)
    assert status == 0 and "lost its memory after it was checked" in text


def test_a_problem_is_read_only():
    """It is kept for later calls, of all backends."""
    prev, cur = sbh(), sbh(seed=1)
    right = rau.ring_attention_update(*prev, *cur)
    spoil = {
        "blocks": lambda problem: np.multiply(problem.blocks, 64, out=problem.blocks),
        "terms": lambda problem: np.multiply(problem.block_terms.terms, 64, out=problem.block_terms.terms),
        "starts": lambda problem: np.add(problem.block_terms.starts, 1, out=problem.block_terms.starts),
        "lengths": lambda problem: np.add(problem.block_terms.lengths, 1, out=problem.block_terms.lengths),
        "T": lambda problem: setattr(problem, "T", 5),
    }
    for what, write in spoil.items():
        with pytest.raises((ValueError, AttributeError), match="read-only|must not be written"):
            rau.ring_attention_update(*prev, *cur, backend=Answers(lambda problem, *_, write=write: write(problem)))
        assert same_bits(rau.ring_attention_update(*prev, *cur), right) == [], what


def test_strides_of_axes_of_length_1_are_not_computed_with():
    prev, cur = sbh(), sbh(seed=1)
    right = rau.ring_attention_update(*prev, *cur)
    wide = np.zeros((*prev.attn_out.shape[:2], prev.attn_out.shape[2] + 3), np.float32)
    wide[..., : prev.attn_out.shape[2]] = prev.attn_out
    far = [as_strided(wide[:, :1], (4, 1, prev.attn_out.shape[2]), (wide.strides[0], 2**62, 4)), *(s[:1] for s in prev[1:])]
    near = [cur.attn_out[:, :1], *(s[:1] for s in cur[1:])]
    seen = []

    def look(problem, prev, cur, out):
        seen.append(problem.strides[0])
        return rau.AttentionState(*(np.empty(part.shape, part.dtype) for part in cur))

    rau.ring_attention_update(*far, *near, backend=Answers(look))
    assert seen[0][1] == 0 and seen[0][0] == wide.strides[0] // 4
    for backend in HOST:
        found = rau.ring_attention_update(*far, *near, backend=backend)
        assert same_bits(found, [right[0][:, :1], *(s[:1] for s in right[1:])]) == []


def test_a_state_without_an_element_is_in_place_or_not_whatever_came_before():
    class Apart(Backend):
        name, capabilities = "apart", Capabilities(array_types=("numpy:ndarray",), in_place=False)

        def update(self, problem, prev, cur, out):
            return out

    def empty():
        return rau.AttentionState(np.zeros((0, 1, 16), "f4"), *(np.zeros((1, 2, 0, 8), "f4") for _ in range(2)))

    for in_place_first in (True, False):
        cache._problems.clear()
        prev = empty()
        for out in (prev, empty()) if in_place_first else (empty(), prev):
            if out is prev:
                with pytest.raises(rau.UnsupportedError, match="does not write over its inputs"):
                    rau.ring_attention_update(*prev, *empty(), out=out, backend=Apart())
            else:
                rau.ring_attention_update(*prev, *empty(), out=out, backend=Apart())


@pytest.mark.parametrize("make", [lambda ring: ring, copy.deepcopy, lambda ring: pickle.loads(pickle.dumps(ring))])
def test_a_copy_of_a_running_state_refuses_its_own_arrays(make):
    ring = rau.StreamingMerge()
    ring.update(*sbh())
    one = make(ring)
    with pytest.raises(rau.ShapeError, match="shares memory with the running state"):
        one.update(*one.running)


def test_tables_of_types_and_dtypes_do_not_grow():
    prev, cur = sbh(), sbh(seed=1)

    def call(array):
        try:
            rau.ring_attention_update(array, *prev[1:], *cur)
        except rau.RauError:
            pass

    makers = {
        "classes": lambda k: prev[0].view(type(f"C{k}", (np.ndarray,), {})),
        "dtypes": lambda k: np.zeros((4, 2, 24), [(f"f{k}", "f4")]),
    }
    for what, make in makers.items():
        grown = []
        for _ in range(2):  # the first round fills what is filled once
            tracemalloc.start()
            before = tracemalloc.get_traced_memory()[0]
            for k in range(500):
                call(make(k))
            gc.collect()
            grown.append(tracemalloc.get_traced_memory()[0] - before)
            tracemalloc.stop()
        assert min(grown) < 500 * 600, (what, grown)


def test_states_are_counted_before_they_are_looked_at():
    stats = np.empty((2**40, 1, 1, 0, 8), np.float32)
    with pytest.raises(rau.ShapeError, match="has K = 1099511627776 states; expected at most 65536"):
        rau.merge_states((np.empty((2**40, 0, 1, 4), np.float32), stats, stats))
    with pytest.raises(rau.ShapeError, match="has K = 65537 states"):
        rau.merge_states([sbh()] * 65537)
    none = np.empty((2**40, 0, 8), np.float32)
    with pytest.raises(rau.ShapeError, match="indptr gives row 1 1099511627775 states; expected at most 65536"):
        rau.merge_states((none, none, none), layout="TND", indptr=[0, 1, 2**40])


@pytest.mark.parametrize("backend", HOST)
def test_calls_that_have_nothing_to_write_walk_over_no_rows(backend):
    """Ways to have any number of rows in no memory: one number behind all of them, and batch entries without a token."""
    status, text = alone(f"""
        import rau
        many, one = 2**40, np.ones((1, 1, 1), "f4")
        rows = np.broadcast_to(one[..., :0], (many, 1, 0)), *[np.broadcast_to(one, (many, 1, 8))] * 2
        how = dict(profile="portable", backend="{backend}")
        found = rau.merge_states([rows, rows], layout="TND", statistics=False, **how)
        assert found.shape == (many, 1, 0)
        entries = np.empty((many, 0, 1, 8), "f4"), *[np.empty((many, 1, 0, 8), "f4")] * 2
        found = rau.merge_states([entries, entries], layout="BSND", **how)
        assert found.attn_out.shape == (many, 0, 1, 8)
    """)
    assert (status, text) == (0, "")


# ----------------------------------------------------------------------------------------------------- what is printed


def test_messages_are_of_a_length_to_be_read():
    with pytest.raises(rau.RauError) as caught:
        rau.merge_states([[k, np.zeros((k % 7, 1, 2)), [k]] for k in range(20_000)])
    assert len(str(caught.value)) < 10_000
    assert len(caught.value.rules) > 1
    for call in (
        lambda: rau.merge_states([sbh()], backend="x" * 500_000),
        lambda: rau.merge_states([sbh()], layout="x" * 500_000),
        lambda: rau.merge_states([tnd()], ["x" * 500_000], "TND"),
        lambda: rau.set_num_threads("x" * 500_000),
    ):
        with pytest.raises(rau.RauError) as caught:
            call()
        assert len(str(caught.value)) < 1000


def test_whatever_an_argument_does_when_it_is_asked():
    class Bad:
        def _(self, *_):
            raise ZeroDivisionError

        __repr__ = __str__ = __index__ = _
        shape = property(_)

    class Index(int):
        __repr__ = Bad._

    hashes = type("M", (type,), {"__hash__": Bad._})("Hash", (), {})
    deep = []
    for _ in range(100_000):
        deep = [deep]
    ring = rau.StreamingMerge()
    ring.update(*sbh())
    p, q = sbh(), tnd()
    calls = {
        "shape": lambda: rau.merge_states([Bad()] * 3),
        "hash": lambda: rau.merge_states([[hashes(), *p[1:]]]),
        "dtype": lambda: ring.result(Bad()),
        "backend": lambda: rau.merge_states([p], backend=Bad()),
        "lengths": lambda: rau.merge_states([q], [Bad()], "TND"),
        "threads": lambda: rau.set_num_threads(Bad()),
        "tokens": lambda: ring.update(*p, tokens=slice(Bad(), None)),
        "tokens backwards": lambda: ring.update(*p, tokens=slice(Index(3), Index(0), Index(-1))),
        "deep": lambda: rau.merge_states([q], deep, "TND"),
        "layout": lambda: rau.merge_states([p], layout=Bad()),
        "heads": lambda: rau.AttentionState.from_lse(p[0], p[1][..., 0], base="e", heads=Bad()),
    }
    for name, call in calls.items():
        with pytest.raises((rau.RauError, TypeError, ValueError)):
            call()
            pytest.fail(name)


NAMED = {
    "ring_attention_update": ("layout", "softmax_layout", "profile", "check"),
    "merge_states": ("layout", "softmax_layout", "profile", "check"),
    "merge_states, of some tokens": ("layout", "softmax_layout", "profile", "check"),
    "merge_states, by row": ("layout", "softmax_layout", "profile", "check"),
    "StreamingMerge": ("layout", "softmax_layout", "profile", "check"),
    "add_sink": ("layout", "softmax_layout", "check"),
    "merge_lse": ("layout", "lse_layout", "base"),
    "from_lse": ("layout", "lse_layout", "base"),
    "from_max_sum": ("layout", "stats_layout", "base"),
    "lse": ("layout", "softmax_layout", "lse_layout", "base"),
    "reorder_softmax": ("to",),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("call", NAMED)
@pytest.mark.parametrize(
    "given",
    [
        np.zeros((2, 0, 1)),
        np.zeros(0),
        np.zeros(2),
        np.array("TND"),
        np.array(["TND", "SBH"]),
        np.zeros(2, "i4,f4"),
        b"TND",
        [],
        {},
        1.5,
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_name_that_is_no_word_is_named(call, given):
    state, packed = tnd(3), ("TND", "SBH")
    out, rows = state[0], state[1][..., 0]
    calls = {
        "ring_attention_update": lambda **how: rau.ring_attention_update(*state, *state, [0, 3], **how),
        "merge_states": lambda **how: rau.merge_states([state, state], [0, 3], **how),
        "merge_states, of some tokens": lambda **how: rau.merge_states([state, state], tokens=[1], **how),
        "merge_states, by row": lambda **how: rau.merge_states(state, indptr=[0, 3], **how),
        "StreamingMerge": lambda **how: rau.StreamingMerge(actual_seq_qlen=[0, 3], **how),
        "add_sink": lambda **how: rau.add_sink(state, np.zeros(2, "f4"), actual_seq_qlen=[0, 3], **how),
        "merge_lse": lambda **how: rau.merge_lse([(out, rows)] * 2, **{"base": "e", "lse_layout": "TN", **how}),
        "from_lse": lambda **how: rau.AttentionState.from_lse(out, rows, **{"base": "e", "lse_layout": "TN", **how}),
        "from_max_sum": lambda **how: rau.AttentionState.from_max_sum(
            out, rows, rows, **{"base": "e", "stats_layout": "TN", **how}
        ),
        "lse": lambda **how: rau.AttentionState(*state).lse(**{"base": "e", "lse_layout": "TN", "actual_seq_qlen": [0, 3], **how}),
        "reorder_softmax": lambda **how: rau.reorder_softmax(state[1], [0, 3], **how),
    }
    for name in NAMED[call]:
        for order in packed if "softmax_layout" in NAMED[call] and name != "softmax_layout" else ("TND",):
            how = {"layout": "TND", "softmax_layout": order} if "softmax_layout" in NAMED[call] else {"layout": "TND"}
            if call == "reorder_softmax":
                how = {}
            with pytest.raises(rau.RauError, match=rf"\b{name} = "):
                calls[call](**{**how, name: given})


@pytest.mark.parametrize("backend", HOST)
def test_what_the_caller_asks_of_numpy_reaches_nobody(backend):
    tiny = rau.AttentionState(*(np.full_like(part, 1e-40) for part in sbh()))
    with np.errstate(all="raise"):
        state = rau.AttentionState.from_lse(tiny[0], tiny[1][..., 0], base="2")
        state.lse(base="2")
        ring = rau.StreamingMerge(backend=backend)
        ring.update(*tiny)
        ring.update(*state)
        ring.result(np.float16)
        rau.merge_states([tiny, state], backend=backend)


# ----------------------------------------------------------------------------------------------------------- plugins


def test_what_a_backend_returns_is_looked_at():
    prev, cur, out = sbh(), sbh(seed=1), sbh(seed=2)
    wrong = {
        "returned a NoneType; expected an AttentionState": None,
        "returned a tuple; expected an AttentionState": (1, 2),
        r"returned a wrong array: attn_out has shape \(3,\); expected \(4, 2, 24\)": rau.AttentionState(*[np.zeros(3)] * 3),
        "returned a wrong array: attn_out is a int; expected the inputs' kind": (1, 2, 3),
    }
    for says, answer in wrong.items():
        with pytest.raises(rau.RauError, match=f'backend "answers" {says}'):
            rau.ring_attention_update(*prev, *cur, backend=Answers(answer))
        ring = rau.StreamingMerge(backend=Answers(answer))
        with pytest.raises(rau.RauError, match='backend "answers" returned'):
            ring.update(*prev)
    with pytest.raises(rau.RauError, match="returned other arrays than those of `out`"):
        rau.ring_attention_update(*prev, *cur, out=out, backend=Answers(sbh(seed=9)))


class Mute(Exception):
    def __str__(self):
        raise ZeroDivisionError


def raising(error):
    def load():
        raise error

    return load


def made(**fields):
    return lambda: type(
        "P", (Backend,), {"name": "p", "capabilities": Capabilities(**{"array_types": ("numpy:ndarray",), **fields})}
    )


@pytest.mark.parametrize(
    "load",
    [
        raising(asyncio.CancelledError()), raising(GeneratorExit()), raising(Mute()), raising(SystemExit(3)),
        made(array_types=None), made(limits=lambda problem: 1 / 0), made(limits=lambda problem: None),
        made(limits=lambda problem: [None]), made(head_dim_multiple=0), made(lanes=(7,)), made(tolerance="much"),
        lambda: SimpleNamespace(name="p"), lambda: None,
    ],
)  # fmt: skip
def test_a_broken_plugin_is_its_own_matter(load, fresh_registry):
    """Whatever it does, calls that did not ask for it say what they have to say."""
    registry.names()
    plugins._entries["p"] = plugins.Entry("a plugin", load)
    prev, cur = sbh(), sbh(seed=1)
    with pytest.raises(rau.DTypeError, match=r"\[array\]"):
        rau.ring_attention_update([1], *prev[1:], *cur)
    assert "p:" in str(rau.explain(*prev, *cur))
    with pytest.raises(rau.RauError):
        rau.ring_attention_update(*prev, *cur, layout="SBH", backend="nobody")
    rau.show_config("dicts")
    assert [status.name for status in registry.status()][-1] == "p"
    rau.ring_attention_update(*prev, *cur)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("array_types", None), ("array_types", "numpy:ndarray"), ("dtypes", ["float32"]), ("layouts", (1,)), ("devices", "cpu"),
        ("lanes", (7,)), ("lanes", 8), ("max_heads", -1), ("max_head_dim", 1.5), ("head_dim_multiple", 0),
        ("head_dim_multiple", None), ("limits", "none"), ("tolerance", "much"), ("tolerance", 0), ("tolerance", float("nan")),
        ("tolerance", "40"), ("mixed", "no"), ("in_place", None),
    ],
)  # fmt: skip
def test_capabilities_that_cannot_be(field, value):
    with pytest.raises(TypeError, match=f"Capabilities: .*{field}"):
        Capabilities(**{"array_types": ("numpy:ndarray",), field: value})


def test_capabilities_say_all_that_cannot_be():
    with pytest.raises(TypeError) as refused:
        Capabilities(array_types="numpy:ndarray", lanes=8, tolerance="40", head_dim_multiple=0)
    lines = str(refused.value).splitlines()
    assert [line.split(" = ")[0] for line in lines] == [
        f"Capabilities: {name}" for name in ("array_types", "lanes", "head_dim_multiple", "tolerance")
    ]
    assert lines[0] == "Capabilities: array_types = 'numpy:ndarray'; expected a tuple of str, such as ('numpy:ndarray',)."
    with pytest.raises(TypeError) as refused:
        Capabilities(array_types=("numpy:ndarray",), layout=("SBH",), speed=3)
    one, other = str(refused.value).splitlines()
    assert one == "Capabilities: layout = ('SBH',): no such field; did you mean \"layouts\"?"
    assert other.startswith("Capabilities: speed = 3: no such field; expected some of array_types, devices, dtypes, ")


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("layouts", ("SBH", "BSHD"), r"names 'BSHD'; expected some of SBH, TND, BSND, BNSD\. Did you mean \"BSND\"\?"),
        ("dtypes", ("fp32",), "names 'fp32'; expected some of float16, bfloat16, float32, float64"),
        ("softmax_layouts", ("TN",), "names 'TN'; expected some of TND, SBH"),
        ("lanes", (), r"= \(\); expected at least one of 8, 1"),
        ("array_types", ("numpy.ndarray",), "names 'numpy.ndarray'; expected \"module:qualname\""),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isidentifier() else "",
)
def test_names_that_do_not_exist_are_told_by_the_kit(field, value, said):
    """And by nobody else: to an older version, a plugin may declare what is new."""
    declared = Capabilities(**{"array_types": ("numpy:ndarray",), field: value})
    backend = type("Typo", (Backend,), {"name": "typo", "capabilities": declared})
    with pytest.raises(rau.UnknownBackendError, match=f"^Typo declares what does not exist:\nCapabilities: {field} .*{said}"):
        load(backend)


def distribution(name, points):
    """A stranger's distribution."""
    found = [importlib.metadata.EntryPoint(point, value, "rau.backends") for point, value in points.items()]
    return SimpleNamespace(name=name, entry_points=importlib.metadata.EntryPoints(found))


@pytest.mark.parametrize("installed", [True, False])
def test_our_names_cannot_be_taken(installed, monkeypatch, fresh_registry):
    ours = distribution("ring-attention-update", {"torch": "rau.backends.torch_:TorchBackend"})
    stranger = distribution("stranger", {"torch": "nowhere:B", "cython": "nowhere:B", "own": "nowhere:B"})
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: [stranger, *[ours] * installed])
    registry.refresh()
    found = {status.name: status for status in registry.standings()}
    assert "also declared by stranger, which is ignored" in found["cython"].reason
    if installed:
        assert (
            found["torch"].origin == "ring-attention-update"
            and "also declared by stranger, which is ignored" in found["torch"].reason
        )
    else:
        assert found["torch"].state == "unavailable"
        assert "declared by stranger, which is ignored: the name is kept for ring-attention-update" in found["torch"].reason
    assert found["own"].origin == "stranger"


def test_refresh_disturbs_no_call():
    errors, calling = set(), 2
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)

    def call():
        nonlocal calling
        for _ in range(200):
            try:
                rau.ring_attention_update(*sbh(), *sbh())
                registry.standings()
            except Exception as error:
                errors.add(repr(error)[:90])
        calling -= 1

    def refresh():
        while calling:
            registry.refresh()

    threads = [threading.Thread(target=call) for _ in range(2)] + [threading.Thread(target=refresh)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_while_a_plugin_is_loaded():
    code = """
        import os, threading
        from rau import plugins, registry
        (begun, begin), (gone_on, go_on) = os.pipe(), os.pipe()
        def slow():
            os.write(begin, b".")
            os.read(gone_on, 1)
            raise ImportError("never mind")
        registry.names()
        for name in list(plugins._entries):
            if name not in ("cython", "numpy"):
                del plugins._entries[name]
        plugins._entries["slow"] = plugins.Entry("a plugin", slow)
        loading = threading.Thread(target=registry.status); loading.start()
        os.read(begun, 1)
        child = os.fork()
        if child == 0:
            print(registry.status()[-1].reason, flush=True)
            os._exit(0)
        os.write(go_on, b"..")  # for the thread here, and for the child, which has none
        os.waitpid(child, 0); loading.join()
        print(registry.status()[-1].reason, flush=True)
    """
    assert alone(code) == (0, "ImportError: never mind\n" * 2)


# ----------------------------------------------------------------------------------------------- threads and signals


@pytest.mark.skipif(not hasattr(os, "setuid") or os.getuid() != 0, reason="the limit on processes holds for others than root")
@needs_core
def test_threads_that_cannot_be_started():
    code = """
        import resource, sys, os
        import rau
        prev, cur = state(4000, 8, 64), state(4000, 8, 64, seed=1)
        rau.registry.get("cython")
        os.setgid(65534); os.setuid(65534)
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
        rau.set_num_threads(4)
        print(rau.ring_attention_update(*prev, *cur, backend="cython").attn_out.shape)
    """
    assert alone(code) == (0, "(4000, 1, 512)\n")


@needs_core
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="a single CPU")
@pytest.mark.parametrize("variable", ["OMP_PROC_BIND=true", "OMP_PLACES=cores", "OMP_WAIT_POLICY=passive"])
def test_a_bound_thread_is_not_all_the_processors(variable):
    name, value = variable.split("=")
    code = "import rau; rau.registry.get('cython'); print(rau.get_num_threads())"
    counts = {alone(code, **extra)[1] for extra in ({}, {name: value})}
    assert len(counts) == 1 and counts != {"1\n"}


def test_the_environment_is_read_as_python_has_it(monkeypatch):
    monkeypatch.setenv("RAU_BACKEND", "numpy")
    assert registry.requested() == ("numpy", "RAU_BACKEND")
    monkeypatch.delenv("RAU_BACKEND")
    assert registry.requested() == (None, "automatic")


@pytest.mark.skipif(os.name != "posix", reason="C's environment is another one there")
def test_the_environment_of_c_is_not_read():
    """A library may set variables in a thread of its own, beside which C's getenv is not safe."""
    code = """
        import ctypes, rau
        ctypes.CDLL(None).setenv(b"RAU_BACKEND", b"nobody", 1)
        print(rau.registry.requested())
    """
    assert alone(code) == (0, "(None, 'automatic')\n")


@pytest.mark.parametrize("how", [KeyboardInterrupt, OSError, rau.RauError, None])
def test_a_running_state_that_was_cut_short_says_so(how):
    """By Ctrl-C, by a fault of the backend's, or because what it returned was refused."""
    stopped = False

    def stop(problem, prev, cur, out):
        if stopped and how is None:
            return None
        if stopped:
            raise how
        return registry.get("numpy").update(problem, prev, cur, out)

    ring = rau.StreamingMerge(backend=Answers(stop))
    ring.update(*sbh())
    stopped = True
    with pytest.raises(how or rau.RauError):
        ring.update(*sbh(seed=1))
    for call in (lambda: ring.update(*sbh()), ring.result):
        with pytest.raises(rau.UnsupportedError, match="an earlier update was stopped while it wrote"):
            call()


def test_a_log_handler_that_raises_is_the_callers(caplog):
    """Nothing is written by then."""

    class Handler(logging.Handler):
        def emit(self, record):
            raise LookupError

    logger, handler = logging.getLogger("rau"), Handler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    out = sbh(seed=2)
    before = [part.copy() for part in out]
    try:
        with pytest.raises(LookupError):
            rau.ring_attention_update(*sbh(), *sbh(seed=1), out=out)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert same_bits(out, before) == []
