"""The compiled core's machine code: what a compiler did to the loops that no value and no warning shows."""

import os
import platform
import re
import shutil
import subprocess

import pytest

_core = pytest.importorskip("rau._core", reason="test_packaging.py fails where it should be there")

pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="reads x86's instructions")

VERSIONS = ("baseline", "avx2", "avx512")
LOOPS = [
    f"{name}_{version}"
    for name in ("weigh_f32", "weigh_f64", *(f"rows_{its}" for its in ("f32", "f16", "bf16", "f64", "f32_f16", "f32_bf16")))
    for version in VERSIONS
]  # fmt: skip

BYTES = {"BYTE": 1, "WORD": 2, "DWORD": 4, "QWORD": 8, "XMMWORD": 16, "YMMWORD": 32, "ZMMWORD": 64}
INSTRUCTION = re.compile(r"^ +([0-9a-f]+):\t(\S+) *([^<#\n]*)", re.MULTILINE)
ON_STACK = re.compile(r"(\w+) PTR \[(r[sb]p)([+-]0x[0-9a-f]+)?\]")
READS = re.compile(r"(cmp|test|v?u?comis|push|nop|prefetch|call|jmp|bt$)")  # of instructions with memory first, as stores have


def functions(listing):
    """Instructions by function: address, name, operands."""
    parts = re.split(r"^[0-9a-f]+ <(.+)>:$", listing, flags=re.MULTILINE)
    return {
        name: [(int(address, 16), which, operands) for address, which, operands in INSTRUCTION.findall(body)]
        for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }


def jumps(code):
    """Where each jump stands and goes."""
    return [(address, int(to, 16)) for address, name, to in code if name[0] == "j" and re.fullmatch("[0-9a-f]+ *", to)]


def not_forwarded(code, starts):
    """Vectors that are loaded from the stack, where several stores put their bytes.

    A processor hands a stored value on to a load, before it is in the cache, only if one store holds all of it; otherwise the
    load waits until they are there, some 12 cycles. At the addresses `starts` nothing is known of earlier stores.
    """
    found, stores = [], {}
    for address, name, operands in code:
        if address in starts:
            stores = {}
        place = ON_STACK.search(operands)
        if not place or name == "lea":
            continue
        bytes_ = [(place[2], int(place[3] or "0", 16) + its) for its in range(BYTES[place[1]])]
        if operands.startswith(place[0]) and not READS.match(name):
            stores.update(dict.fromkeys(bytes_, f"{address:x} {name} {operands}"))
        elif len(bytes_) >= 16:
            last = {stores.get(its) for its in bytes_}
            if len(last) > 1 and None not in last:  # of a place used twice, for a number and a vector, only parts are known
                found.append(f"{address:x} {name} {operands} after {', '.join(sorted(last))}")
    return found


def failures(code):
    """Look at each straight piece of code, and at each innermost loop as if no branch within it were taken."""
    found, there = set(not_forwarded(code, {to for _, to in jumps(code)})), jumps(code)
    backward = [(to, address) for address, to in there if to <= address]
    for first, last in backward:
        if not any(first <= to and address <= last and (to, address) != (first, last) for to, address in backward):
            found.update(not_forwarded([its for its in code if first <= its[0] <= last], ()))
    return sorted(found)


@pytest.fixture(scope="module")
def disassembled():
    if shutil.which("objdump") is None:
        if "cython" in os.environ.get("RAU_TEST_BACKENDS", ""):
            pytest.fail("objdump, of binutils, is missing; the compiled core was asked for")
        pytest.skip("objdump is missing, and the compiled core was not asked for")
    command = ["objdump", "-d", "-M", "intel", "--no-show-raw-insn", _core.__file__]
    return functions(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("name", LOOPS)
def test_no_vector_is_stored_in_parts_and_loaded_whole(disassembled, name):
    """gcc 12 copied a struct of two vectors by 16 bytes over the stack: half of the speed with AVX2, and the same bits."""
    assert name in disassembled, "no such function: renamed, inlined, or the core is stripped"
    assert not failures(disassembled[name])


LISTING = """
0000000000000ffb <loop>:
    0ffb:	je     {within} <loop+0x0>
    1000:	vmovdqu xmm4,XMMWORD PTR [rax]
    1004:	{store} XMMWORD PTR [rbp-0x70],xmm4
    1009:	{store} XMMWORD PTR [rbp-0x60],xmm5
    100e:	vmulps ymm2,ymm0,YMMWORD PTR [rbp-0x{load}]
    1013:	add    rax,0x20
    1017:	jne    ffb <loop+0x0>
    1019:	ret
"""


@pytest.mark.parametrize(
    ("store", "load", "within", "count"),
    [
        ("vmovdqa", "70", "1000", 1), ("vmovdqa", "70", "100e", 1),
        ("vmovdqa", "80", "1000", 0), ("cmp", "70", "1000", 0),
    ],
    ids=["straight on", "a label between", "elsewhere", "read only"],
)  # fmt: skip
def test_what_counts(store, load, within, count):
    code = functions(LISTING.format(store=store, load=load, within=within))["loop"]
    assert len(failures(code)) == count
