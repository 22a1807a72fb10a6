"""The numbers of rau's exponential, which every backend computes by the same IEEE operations.

exp(x) for x <= 0 is 2**k * exp(r) with k = round(x * LOG2_E) and r = (x - k * LN2_HIGH) - k * LN2_LOW, hence
abs(r) <= ln(2) / 2; exp(r) is its Taylor polynomial of degree 12 in Horner's order. k * LN2_HIGH is exact. Below
UNDERFLOW the result is 0. Its relative error is at most 3.6 * 2**-53. No library's exp is used because they differ in
the last bit.
"""

import math

LOG2_E = float.fromhex("0x1.71547652b82fep+0")
ROUND = float.fromhex("0x1.8p52")  # added and subtracted, it rounds to the nearest integer
LN2_HIGH = float.fromhex("0x1.62e42feep-1")
LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")
TAYLOR = tuple(1.0 / math.factorial(n) for n in range(12, -1, -1))
UNDERFLOW = -708.0
