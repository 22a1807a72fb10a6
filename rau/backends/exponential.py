"""The numbers of rau's exponential, which every backend computes by the same IEEE operations, none of them fused.

exp(x) for x <= 0 is 2**k * exp(r) with k = round(x * LOG2_E) and r = (x - k * LN2_HIGH) - k * LN2_LOW, hence
abs(r) <= 0.34657362; k * LN2_HIGH is exact. exp(r) is a polynomial in Horner's order, every step p * r + c. Below UNDERFLOW
the result is 0, NaN stays NaN. No library's exp is used because they differ in the last bit.

What goes in is a difference of two maxima, which is rounded itself. So the rounding error comes along: with d + err the exact
difference (Knuth's TwoSum) and q = exp(d), the exponential of the difference is q + q * err. Where maxima lie hundreds apart, the
error of d alone would cost hundreds of units in the last place.

The kernels in C have these numbers too (rau/csrc/weigh.h); a test compares them.
"""

LOG2_E = float.fromhex("0x1.71547652b82fep+0")
ROUND = float.fromhex("0x1.8p52")  # added and subtracted, it rounds to the nearest integer
LN2_HIGH = float.fromhex("0x1.62e42feep-1")
LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")
# Minimax in the relative error, from the highest degree, by Sollya: fpminimax(exp(x), 11, [|D...|], [-ln2/2, ln2/2], relative)
# with the last two held at 1. One term less than Taylor's polynomial of the same accuracy, hence one rounding less.
COEFFICIENTS = tuple(
    map(
        float.fromhex,
        """
        0x1.ad92c81f74ea2p-26 0x1.28adf7a9a959ep-22 0x1.71df18fbb1812p-19 0x1.a0199963c408ap-16 0x1.a01a012fec32ap-13
        0x1.6c16c18475a28p-10 0x1.1111111126b37p-7 0x1.55555555506cp-5 0x1.55555555554fep-3 0x1.000000000000ap-1 0x1p0 0x1p0
        """.split(),
    )
)
UNDERFLOW = -708.0
