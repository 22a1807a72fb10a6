"""The peers that are installed, in earnest: each passes what it promises, and what it does beyond that is as written here."""

import inspect
import re
from pathlib import Path

import pytest
from adapters import ADAPTERS
from stand_ins import STAND_INS

from rau import registry
from rau.errors import BackendUnavailableError
from rau.testing import check_backend

TABLE = Path(__file__).parents[3] / "docs" / "peers.md"
HERE = [status.name for status in registry.status() if status.name in ADAPTERS and status.available]

# Of what a peer does not promise, what it does. The page has the same of those that cannot be installed here.
DOES = {
    "natten": {"nan", "signed-zero"},
    "sdpa-merger": {"nan", "signed-zero"},
}


def test_torchs_own_merger_is_here():
    assert "sdpa-merger" in HERE


@pytest.mark.parametrize("name", HERE)
def test_it_passes_what_it_promises(name):
    report = check_backend(name)
    assert report.passed, report.failures[:3]
    assert {key for key, problems in report.unpromised.items() if not problems} == DOES[name]


@pytest.mark.parametrize("name", HERE)
def test_its_signature_is_that_of_the_stand_in(name):
    adapter = registry.get(name)
    for attribute, ours in STAND_INS[name].items():
        its = getattr(adapter._kernel, attribute, adapter._kernel)
        for method in ("__init__", "step", "results") if inspect.isclass(its) else (None,):
            one, other = (inspect.signature(getattr(each, method) if method else each) for each in (its, ours))
            told = [[(p.name, p.kind, p.default) for p in each.parameters.values()] for each in (one, other)]
            assert told[0] == told[1], (attribute, method)


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name not in HERE])
def test_never_run_here(name):
    with pytest.raises(BackendUnavailableError, match=ADAPTERS[name].where.partition(".")[0].partition(":")[0]):
        registry.get(name)


@pytest.mark.parametrize("name", ADAPTERS)
def test_it_takes_ten_lines(name):
    """One more where the peer leaves it to its caller to call one function for each state."""
    adapter = ADAPTERS[name]
    code = inspect.getsource(adapter).replace(f'    """{adapter.__doc__}"""\n', "")
    assert len([line for line in code.splitlines() if line.strip()]) <= 10 + name.startswith("transformer-engine")


def test_the_page_lists_every_adapter_and_whether_it_has_run():
    rows = dict(re.findall(r"^\| `([a-z0-9-]+)` \|.*\| ([^|]+) \|$", TABLE.read_text(), re.M))
    assert rows.keys() == ADAPTERS.keys()
    assert not [name for name in HERE if rows[name].startswith("never run")]
