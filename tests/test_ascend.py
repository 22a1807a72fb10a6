"""The ascend backend: what it says on a machine without a chip, and all it does on a stand-in for one."""

import os
import subprocess
import sys
import types
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest
from states import arguments, sbh, tnd
from test_packaging import PYPROJECT

import rau
from plugins import install
from rau import registry
from rau.backends import ascend_operators
from rau.backends.ascend_ import AscendBackend
from rau.errors import BackendUnavailableError

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def laptop(monkeypatch):
    """No chip, neither framework's part for it, and the backend known as an installation would make it known."""
    for name in ("RAU_BACKEND", "RAU_BLOCK"):
        monkeypatch.delenv(name, raising=False)
    for name in ("torch_npu", "mindspore"):
        monkeypatch.setitem(sys.modules, name, None)  # what is None there cannot be imported
    registry.refresh()
    if "ascend" not in registry.names():
        registry.register(AscendBackend)
    yield
    monkeypatch.undo()
    registry.refresh()


def verdict(**given):
    return next(one for one in rau.explain(**given).verdicts if one.name == "ascend")


def test_on_a_laptop_it_says_what_the_chip_would_say():
    found = verdict(**arguments(tnd, N=43, D=128), actual_seq_qlen=[0, 8], layout="TND", profile="portable")
    assert found.limits == [
        "attn_out with N = 43, D = 128, float32 needs AlignUp(N*D, 64) * (4*6 + 8) + AlignUp(N*8, 64) * 56 = 197632 "
        "bytes; the limit is 192*1024 = 196608"
    ]
    assert found.arrays == [
        "numpy:ndarray is not one of torch:Tensor, mindspore.common.tensor:Tensor", "device cpu is not one of npu, ascend"
    ]  # fmt: skip
    if find_spec("torch"):
        assert not found.tried
    else:
        assert found.unavailable == "it takes arrays of mindspore or torch, which is not installed"
    with pytest.raises(rau.BackendUnavailableError):
        registry.get("ascend")
    found = verdict(**arguments(tnd), actual_seq_qlen=[0, 8], layout="TND", profile="portable")
    assert found.unavailable == f"{ascend_operators.TORCH_NPU}; {ascend_operators.MINDSPORE}"
    assert verdict(**arguments(tnd, N=42, D=128), actual_seq_qlen=[0, 8], layout="TND").limits == []


@pytest.mark.parametrize(
    ("profile", "N", "D", "says"),
    [
        ("portable", 2, 65, ['the last axis of attn_out is D = 65; layout "TND" takes multiples of 64']),
        ("portable", 1, 832, []),
        ("portable", 2, 0, ["D = 0: the operator does not take an empty output"]),
        ("cann-v2", 256, 768, []),
    ],
)
def test_limits_of_layout_tnd(profile, N, D, says):
    """Which entry a call is meant for, its profile says: what the profile takes, the backend takes too."""
    found = verdict(**arguments(tnd, N=N, D=D), actual_seq_qlen=[0, 8], layout="TND", profile=profile)
    assert found.limits == says


def test_other_limits():
    assert verdict(**arguments(sbh, D=65)).limits == []  # D is free in SBH
    wide = arguments(sbh, dtype="float64") | {"profile": "portable"}
    assert verdict(**wide).limits == ["dtype float64 is not one of float16, bfloat16, float32"]
    mixed = arguments(sbh) | {"cur_attn_out": arguments(sbh)["cur_attn_out"].astype("f2"), "profile": "portable"}
    assert verdict(**mixed).limits == ["it does not merge float16 into float32"]
    assert verdict(**arguments(sbh, lanes=1), profile="portable").limits == [
        "the number of lanes is 1, not 8: AttentionState.from_lse(..., lanes=8) makes 8"
    ]
    out = [arguments(sbh)[name] for name in ("prev_attn_out", "prev_softmax_max", "prev_softmax_sum")]
    prev = dict(zip(("prev_attn_out", "prev_softmax_max", "prev_softmax_sum"), out, strict=True))
    assert verdict(**arguments(sbh) | prev, out=out).limits == []  # in place is fine


def test_asked_for_by_name_it_fails_with_the_hint():
    says = r'backend "ascend" is not available .*: torch_npu is not installed; MindSpore is not installed: see docs/ascend.md'
    with pytest.raises(rau.BackendUnavailableError, match=says) as caught:
        rau.ring_attention_update(**arguments(), backend="ascend")
    causes = [caught.value]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    assert isinstance(causes[-1], ModuleNotFoundError) and causes[-1].name in ("torch", "torch_npu")


@pytest.mark.skipif(bool(find_spec("torch_npu") or find_spec("mindspore")), reason="one of them is installed")
def test_info_says_what_is_missing(tmp_path):
    if "ascend" not in entry_points(group="rau.backends").names:  # a source tree that is not installed
        install(tmp_path, "declares-ascend", {"ascend": "rau.backends.ascend_:AscendBackend"})
    path = os.pathsep.join([str(tmp_path), str(Path(rau.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-m", "rau", "info"]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=tmp_path)
    line = next(line for line in shown.stdout.splitlines() if line.split()[:1] == ["ascend"])
    assert f"unavailable: {ascend_operators.TORCH_NPU}; {ascend_operators.MINDSPORE}" in line


def test_its_modules_import_no_framework():
    program = (
        "import sys, rau.backends.ascend_, rau.compat; "
        "print([name for name in ('torch', 'torch_npu', 'mindspeed', 'mindspore') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(rau.__file__).parents[1])}
    shown = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def module(name, **attributes):
    made = types.ModuleType(name)
    vars(made).update(attributes)
    return made


def npu(there):
    return types.SimpleNamespace(is_available=lambda: there)


MINDSPORE_ON = {
    target: module("mindspore", get_context={"device_target": target}.__getitem__, ops=types.SimpleNamespace())
    for target in ("CPU", "Ascend")
}


@pytest.mark.parametrize(
    ("modules", "says"),
    [
        ({"torch_npu": module("torch_npu", npu=npu(False))}, "torch_npu is installed, but finds no NPU"),
        ({"torch_npu": module("torch_npu", npu=npu(True)), "mindspeed": None}, ascend_operators.MINDSPEED),
        ({"mindspore": MINDSPORE_ON["CPU"]}, "MindSpore's device target is CPU; expected Ascend"),
        ({"mindspore": MINDSPORE_ON["Ascend"]}, "this MindSpore has no ops.ring_attention_update; newer ones have it"),
    ],
    ids=["no NPU", "no operator", "another target", "an old MindSpore"],
)
def test_each_reason_not_to_be_there(monkeypatch, modules, says):
    monkeypatch.setitem(sys.modules, "torch", module("torch"))
    for name, found in modules.items():
        monkeypatch.setitem(sys.modules, name, found)
    with pytest.raises(BackendUnavailableError) as caught:
        AscendBackend()
    assert says in str(caught.value).split("; ") or says in str(caught.value)
    monkeypatch.setitem(sys.modules, "torch", None)  # before anybody takes it for torch


def test_a_torch_npu_that_does_not_load(monkeypatch, tmp_path):
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_npu")
    monkeypatch.setitem(sys.modules, "torch", module("torch"))
    with pytest.raises(BackendUnavailableError, match=r"^torch_npu does not load: libhccl\.so: cannot open"):
        AscendBackend()


def test_no_extra_names_the_vendors_packages():
    """With torch_npu but no CANN a plain `import torch` raises, and the index's mindspeed is somebody else's."""
    project = PYPROJECT["project"]
    extras = " ".join(sum(project["optional-dependencies"].values(), project["dependencies"])).lower()
    assert not any(name in extras for name in ("torch_npu", "torch-npu", "mindspeed"))
    assert project["entry-points"]["rau.backends"]["ascend"] == "rau.backends.ascend_:AscendBackend"


def test_limits_are_not_written_twice():
    """The reasons are the profiles' messages, less the advice: no profile lifts a chip's limit on the chip."""
    found = verdict(**arguments(tnd, N=2, D=65), actual_seq_qlen=[0, 8], layout="TND", profile="portable").limits
    with pytest.raises(rau.ConstraintError) as caught:
        rau.ring_attention_update(**arguments(tnd, N=2, D=65), actual_seq_qlen=[0, 8], layout="TND")
    assert found[0].replace("attn_out", "prev_attn_out") in str(caught.value)
    assert "portable" not in found[0]


def test_everything_on_the_stand_in_device():
    """Torch's real dispatcher, the operator's exact schema, and its kernel's arithmetic: npu_suite.py, in a process of
    its own, because a device can be made only once, and for good."""
    if "torch" not in os.environ.get("RAU_TEST_BACKENDS", ""):
        pytest.importorskip("torch", reason="torch is not installed and was not asked for")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAU_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "npu_suite.py")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parent)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout
