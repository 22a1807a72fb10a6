"""The compiled core's machine code: what a compiler did to the loops that no value and no warning shows."""

import os
import platform
import re
import shutil

import pytest
from disassembly import functions, hot_loops, innermost, jumps, listing

_core = pytest.importorskip("rau._core", reason="test_packaging.py fails where it should be there")

pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="reads x86's instructions")

VERSIONS = ("baseline", "avx2", "avx512")
LOOPS = [
    f"{name}_{version}"
    for name in ("weigh_f32", "weigh_f64", *(f"rows_{its}" for its in ("f32", "f16", "bf16", "f64", "f32_f16", "f32_bf16")))
    for version in VERSIONS
]  # fmt: skip

BYTES = {"BYTE": 1, "WORD": 2, "DWORD": 4, "QWORD": 8, "XMMWORD": 16, "YMMWORD": 32, "ZMMWORD": 64}
ON_STACK = re.compile(r"(\w+) PTR \[(r[sb]p)([+-]0x[0-9a-f]+)?\]")
MOVES = re.compile(r"(push|pop|(?:sub|add)(?= rsp,0x))\b(?: rsp,0x([0-9a-f]+))?")  # the place that rsp speaks of
READS = re.compile(r"(cmp|test|v?u?comis|push|nop|prefetch|call|jmp|bt$)")  # of instructions with memory first, as stores have


def not_forwarded(code, starts):
    """Vectors that are loaded from the stack, where several stores put their bytes.

    A processor hands a stored value on to a load, before it is in the cache, only if one store holds all of it; otherwise the
    load waits until they are there, some 12 cycles. At the addresses `starts` nothing is known of earlier stores.
    """
    found, stores, moved = [], {}, 0
    for address, name, operands in code:
        if address in starts:
            stores = {}
        place, base = ON_STACK.search(operands), moved
        if moves := MOVES.match(f"{name} {operands}"):
            moved += (1 if moves[1] in ("pop", "add") else -1) * int(moves[2] or "8", 16)
        if not place or name == "lea":
            continue
        start = int(place[3] or "0", 16) + (base if place[2] == "rsp" else 0)
        bytes_ = [(place[2], start + its) for its in range(BYTES[place[1]])]
        if operands.startswith(place[0]) and not READS.match(name):
            stores.update(dict.fromkeys(bytes_, f"{address:x} {name} {operands}"))
        elif len(bytes_) >= 16:
            last = {stores.get(its) for its in bytes_}
            if len(last) > 1 and None not in last:  # of a place used twice, for a number and a vector, only parts are known
                found.append(f"{address:x} {name} {operands} after {', '.join(sorted(last))}")
    return found


def failures(code):
    """Look at each straight piece of code, and at each innermost loop as if no branch within it were taken."""
    found = set(not_forwarded(code, {to for _, to in jumps(code)}))
    return sorted(found.union(*(not_forwarded(loop, ()) for loop in innermost(code))))


@pytest.fixture(scope="module")
def disassembled():
    if shutil.which("objdump") is None:
        if "cython" in os.environ.get("RAU_TEST_BACKENDS", ""):
            pytest.fail("objdump, of binutils, is missing; the compiled core was asked for")
        pytest.skip("objdump is missing, and the compiled core was not asked for")
    return functions(listing("objdump", _core.__file__))


@pytest.mark.parametrize("name", LOOPS)
def test_no_vector_is_stored_in_parts_and_loaded_whole(disassembled, name):
    """gcc 12 copied a struct of two vectors by 16 bytes over the stack: half of the speed with AVX2, and the same bits."""
    assert name in disassembled, "no such function: renamed, inlined, or the core is stripped"
    assert not failures(disassembled[name])


X86 = """
0000000000001000 <rows>:
    1000:	vmovups ymm0,YMMWORD PTR [rax]
    1004:	vmulps ymm0,ymm0,ymm8
    1008:	vmulps ymm1,ymm9,YMMWORD PTR [rbx]
    100c:	vaddps ymm0,ymm0,ymm1{more}
    1010:	{store} YMMWORD PTR [rcx],ymm0
    1014:	jne    1000 <rows+0x0>
    1020:	mov    rdx,QWORD PTR [rsi]        # 5 <rows>
    1024:	vmulps ymm1,ymm9,YMMWORD PTR [rdx]
    1028:	vaddps ymm0,ymm0,ymm1
    102c:	jne    1020 <rows+0x20>
    1030:	ret
"""
AARCH64 = """
0000000000001000 <rows>:
    1000:	ldr	q0, [x1], #16
    1004:	fmul	v0.2d, v0.2d, v8.2d
    1008:	ldr	q1, [x2], #16
    100c:	fmul	v1.2d, v1.2d, v9.2d
    1010:	fadd	v0.2d, v0.2d, v1.2d{more}
    1014:	{store}	q0, [x3]
    1018:	tbnz	w4, #3, 1000 <rows>	// b.any
    1020:	ldr	q1, [x2]
    1024:	fmul	v1.2d, v1.2d, v9.2d
    1028:	fadd	v0.2d, v0.2d, v1.2d
    102c:	b.ne	1020 <rows+0x20>  // b.any
    1030:	fmul	d0, d0, d8
    1034:	fadd	d0, d0, d1
    1038:	cbz	x0, 1030 <rows+0x30>
"""


@pytest.mark.parametrize(
    ("text", "store", "more", "expected"),
    [
        (X86, "vmovups", "", ({0: 12}, 8)), (X86, "vmovups", "\n    100e:\tnop", ({0: 14}, 8)),
        (AARCH64, "str", "", ({0: 56}, 32)), (AARCH64, "str", "\n    1012:\tnop", ({0: 64}, 32)),
    ],
    ids=["x86", "x86, one more", "aarch64", "aarch64, one more"],
)  # fmt: skip
def test_instructions_are_counted_by_unit(text, store, more, expected):
    assert hot_loops(functions(text.format(store=store, more=more))["rows"]) == expected


@pytest.mark.parametrize(
    ("text", "store", "more"),
    [(X86, "vmovntps", ""), (X86, "vmovups", "\n    100e:\tvaddps ymm0,ymm0,ymm2"), (AARCH64, "ldr", "")],
    ids=["around the cache alone", "other arithmetic", "nothing stored"],
)
def test_another_loop_is_not_taken_for_a_hot_one(text, store, more):
    with pytest.raises(LookupError, match="no loop over two states"):
        hot_loops(functions(text.format(store=store, more=more))["rows"])


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


PUSHING = """
0000000000001000 <call>:
    1000:	sub    rsp,0x8
    1004:	movaps XMMWORD PTR [rsp+0x78],xmm14
    1008:	push   0x2
    100c:	mov    QWORD PTR [rsp+{place}],rcx
    1010:	pop    r11
    1014:	add    rsp,0x8
    1018:	movdqa xmm14,XMMWORD PTR [rsp+0x70]
    101c:	ret
"""


@pytest.mark.parametrize(("place", "count"), [("0x70", 0), ("0x80", 1), ("0x88", 1), ("0x90", 0)])
def test_a_place_is_where_rsp_was_then(place, count):
    """gcc 16 stores between the arguments of a call that it pushes."""
    assert len(failures(functions(PUSHING.format(place=place))["call"])) == count
