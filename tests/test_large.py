"""tests/large.py, at a size for every day: it is right, and notices what is not."""

import sys

import large
import pytest

import rau

pytest.importorskip("rau._core", reason="test_packaging.py fails where it should be there")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(large, "REPEATS", 3)
    monkeypatch.setattr(sys, "argv", ["large.py"])


@pytest.mark.parametrize("words", [[], ["--torch"], ["--torch", "--backend", "torch"]], ids=["arrays", "tensors", "torch"])
def test_right(words, monkeypatch):
    if "--torch" in words:
        pytest.importorskip("torch")
    monkeypatch.setattr(sys, "argv", ["large.py", *words])
    assert large.main() == 0


@pytest.mark.parametrize("name", large.CALLS)
def test_one_wrong_number(name, monkeypatch, capsys):
    """In the last period, of the last token's last head: as where an offset wraps around."""
    update = rau.ring_attention_update

    def wrong(*arguments, out, **options):
        update(*arguments, out=out, **options)
        if len(out[0]) > large.PERIOD:
            out[0][-1, -1, -1] += 1

    monkeypatch.setattr(rau, "ring_attention_update", wrong)
    monkeypatch.setattr(sys, "argv", ["large.py", "--only", name])
    assert large.main() == 1
    assert f"1 of 3 periods differ, the first at token {2 * large.PERIOD}" in capsys.readouterr().out
