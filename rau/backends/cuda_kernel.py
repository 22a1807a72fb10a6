"""The Triton kernel of the cuda backend: each program merges some rows of K states, statistics and then elements.

It is that of :mod:`rau.arithmetic`, operation by operation; compile with ``enable_fp_fusion=False``.
"""

import triton
import triton.language as tl

from rau import arithmetic

LOG2_E = tl.constexpr(arithmetic.LOG2_E)
ROUND = tl.constexpr(arithmetic.ROUND)
LN2_HIGH = tl.constexpr(arithmetic.LN2_HIGH)
LN2_LOW = tl.constexpr(arithmetic.LN2_LOW)
COEFFICIENTS = tl.constexpr(arithmetic.COEFFICIENTS)
UNDERFLOW = tl.constexpr(arithmetic.UNDERFLOW)
INFINITY = tl.constexpr(float("inf"))
DOWN = tl.constexpr(2.0**-64)
WORD = tl.constexpr((1 << 62) - 1)

DTYPES = {"float16": tl.float16, "bfloat16": tl.bfloat16, "float32": tl.float32, "float64": tl.float64}


def word(number):
    """Make a number that is not negative an argument that Triton does not specialize on.

    Inside a tuple it compiles anew for a 1, for multiples of 16, and where 32 bits are not enough. So every number
    becomes an odd one of 63 bits.
    """
    return 1 << 62 | number << 1 | 1


@triton.jit
def _rows(array, dtype: tl.constexpr, ALIGNED: tl.constexpr, outer, middle, inner):
    """Pointers to the first element of each row of one array; ALIGNED: each stands at a multiple of 16 bytes."""
    base = ((array[0] & WORD) >> 1).to(tl.pointer_type(dtype))
    base += outer * ((array[1] & WORD) >> 1) + middle * ((array[2] & WORD) >> 1)
    pointers = base + inner * ((array[3] & WORD) >> 1)
    if ALIGNED:
        pointers = tl.multiple_of(pointers, 16)
    return pointers


@triton.jit
def _sequence(lengths, sequences, steps, token, valid):
    """Start and length of each token's sequence; any numbers where the lengths are no cumulative ones."""
    low = tl.zeros_like(token)  # how many of the sequences + 1 numbers are at most `token`, by bisection
    high = low + (sequences + 1)
    step = steps * 0
    while step < steps:  # Triton 3.6's interpreter has no range over an argument under NumPy 2.4
        half = (low + high) // 2
        found = (low < high) & (tl.load(lengths + half, mask=valid & (low < high), other=0) <= token)
        low = tl.where(found, half + 1, low)
        high = tl.where(found, high, half)
        step += 1
    sequence = tl.maximum(tl.minimum(low, sequences) - 1, 0)
    start = tl.load(lengths + sequence, mask=valid, other=0)
    length = tl.load(lengths + tl.minimum(sequence + 1, sequences), mask=valid, other=0) - start
    return start, length


@triton.jit
def _inside(place, count):
    """Places inside [0, count), so that no content of the lengths can reach other memory."""
    return tl.maximum(tl.minimum(place, count - 1), 0)


@triton.jit
def _packed(lengths, sequences, steps, token, tokens, head, heads, valid):
    """Places of rows among packed statistics."""
    start, length = _sequence(lengths, sequences, steps, token, valid)
    return _inside(start * heads + (token - start) + head * length, tokens * heads)


@triton.jit
def _halves(lengths, sequences, steps, token, tokens, head, heads, valid, HALF: tl.constexpr, PACKED: tl.constexpr):
    """Places of rows in a state of sequences twice as long, whose half is meant: tokens, and rows of statistics."""
    start, length = _sequence(lengths, sequences, steps, token, valid)
    within = token - start
    if HALF == "back":
        within += length
    own = _inside(2 * start + within, 2 * tokens)
    place = own
    if PACKED:
        place = _inside(2 * start * heads + within + head * 2 * length, 2 * tokens * heads)
    return own, place


@triton.jit
def _exp_difference(a, b):
    """The exponential of a - b <= 0 or NaN, see rau/arithmetic.py."""
    x = a - b
    back = x - a
    lost = (a - (x - back)) - (b + back)
    safe = tl.where(x >= UNDERFLOW, x, 0.0)
    shifted = safe * LOG2_E + ROUND
    k = shifted - ROUND
    r = (safe - k * LN2_HIGH) - k * LN2_LOW
    p = r * COEFFICIENTS[0] + COEFFICIENTS[1]
    for i in tl.static_range(2, 12):
        p = p * r + COEFFICIENTS[i]
    # The low bits of `shifted` hold k: made an exponent, they are 2**k, without a library's pow.
    q = p * ((shifted.to(tl.int64, bitcast=True) + 1023) << 52).to(tl.float64, bitcast=True)
    return tl.where(x < UNDERFLOW, 0.0, tl.where(x != x, x, q + q * lost))


@triton.jit
def _weigh(maxima, sums, K: tl.constexpr, STATS: tl.constexpr):
    """Merge the statistics of K states in float64; weights, maximum and sum are rounded once."""
    count = tl.zeros_like(sums[0])  # of live states
    maximum = count - INFINITY
    for k in tl.static_range(K):
        live = (sums[k] != 0.0) & (maxima[k] != -INFINITY)
        larger = (maxima[k] > maximum) | (maxima[k] != maxima[k])  # a NaN stays, which tl.maximum would drop
        maximum = tl.where(live & larger, maxima[k], maximum)
        count = tl.where(live, count + 1.0, count)
    total = tl.zeros_like(maximum)
    scaled = tl.zeros_like(maximum)
    shares = ()
    for k in tl.static_range(K):
        live = (sums[k] != 0.0) & (maxima[k] != -INFINITY)
        share = tl.where(live, sums[k] * _exp_difference(maxima[k], maximum), 0.0)
        total += share
        scaled += share * DOWN
        shares += (share,)
    # Finite sums may add up beyond float64; scaled by a power of two their shares are still right.
    huge = tl.abs(total) == INFINITY
    divisor = tl.where(huge, scaled, total)
    weights = ()
    for k in tl.static_range(K):
        live = (sums[k] != 0.0) & (maxima[k] != -INFINITY)
        weight = tl.where(huge, shares[k] * DOWN, shares[k]) / divisor
        weight = tl.where(live, tl.where(count == 1.0, 1.0, weight), 0.0).to(STATS)
        weights += (weight + 0.0,)  # never -0.0, see below
        total = tl.where(live & (count == 1.0), sums[k], total)  # a single live side comes back as it is
    return weights, maximum.to(STATS), total.to(STATS)


@triton.jit
def _widen(elements, dtype: tl.constexpr):
    """Convert to the type that is computed in; exact."""
    if elements.dtype == tl.bfloat16:  # Triton's interpreter would lose subnormals
        wide = (elements.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = elements.to(dtype)
    return wide


@triton.jit
def _narrow(values, dtype: tl.constexpr, BY_INTEGERS: tl.constexpr):
    """Round to the type that is stored, to nearest even; BY_INTEGERS where the conversion to bfloat16 is none or cuts off.

    Both ways give the same bits for every float32 but a NaN's (tests/test_cuda_gpu.py). The integers' six operations an
    element keep registers busy: 0.96 for 0.97 of a copy on an H200.
    """
    if dtype == tl.bfloat16 and BY_INTEGERS:
        bits = values.to(tl.uint32, bitcast=True)
        rounded = bits + (0x7FFF + ((bits >> 16) & 1))
        rounded = tl.where(values == values, rounded, bits | 0x400000)
        narrow = (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        narrow = values.to(dtype)
    return narrow


@triton.jit(do_not_specialize=["lengths", "sequences", "steps", "middles", "inners", "tiles", "head_dim"])
def merge(states, lengths, sequences: tl.int64, steps: tl.int64, middles: tl.int64, inners: tl.int64, tiles: tl.int64,
          head_dim: tl.int64, K: tl.constexpr, FIRST: tl.constexpr, LATER: tl.constexpr, STATS: tl.constexpr,
          LANES: tl.constexpr, ALIGNED: tl.constexpr, PACKED: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
          GROUP: tl.constexpr, BLOCK_D: tl.constexpr, BY_INTEGERS: tl.constexpr):  # fmt: skip
    """Merge ROWS rows along the inner one of three axes; programs run over the middle one, its tiles, the outer one.

    Parameters
    ----------
    states : tuple of tuples of tuples of int64
        For each of the K states and for the result, for each of its three arrays: address and strides along the outer,
        middle and inner axis, in elements; each made a :func:`word`.
    lengths : pointer to int64, or None
        Cumulative sequence lengths where statistics are packed, or halves meant: the inner axis is then tokens, the middle
        one heads.
    sequences, steps : int64
        Number of sequences, and of steps that a bisection of the lengths takes.
    middles, inners, tiles : int64
        Lengths of the middle and the inner axis; tiles of ROWS along the inner one.
    head_dim : int64
    K, FIRST, LATER, STATS, LANES, ALIGNED, PACKED, HALF, ROWS, GROUP, BLOCK_D, BY_INTEGERS
        States; dtypes of the first state and the result, of later states, of statistics; lanes of the result, 0 where it has
        no statistics; whether every row of elements, and of 8 lanes in the result, stands at a multiple of 16 bytes; whether
        statistics are packed; which half of the first state and the result is meant, "" for all; rows of a program, of those
        whose elements are in registers together, and how many elements of each; see :func:`_narrow`.
    """
    program = tl.program_id(0).to(tl.int64)
    middle = program % middles
    tile = program // middles
    outer = tile // tiles
    inner = (tile % tiles) * ROWS + tl.arange(0, ROWS)
    valid = inner < inners
    place = inner
    if PACKED:
        place = _packed(lengths, sequences, steps, inner, inners, middle, middles, valid)
    own, own_place = inner, place  # of the first state and the result
    if HALF != "":
        own, own_place = _halves(lengths, sequences, steps, inner, inners, middle, middles, valid, HALF, PACKED)

    maxima, sums = (), ()
    for k in tl.static_range(K):
        its_place = own_place if k == 0 else place
        lane_0 = _rows(states[k][1], STATS, False, outer, middle, its_place)
        maxima += (tl.load(lane_0, mask=valid, other=0.0).to(tl.float64),)
        lane_0 = _rows(states[k][2], STATS, False, outer, middle, its_place)
        sums += (tl.load(lane_0, mask=valid, other=0.0).to(tl.float64),)
    weights, maximum, total = _weigh(maxima, sums, K, STATS)

    tl.debug_barrier()  # in place: every thread has read its statistics before any of them is overwritten
    if LANES > 0:
        lanes = tl.arange(0, LANES)[None, :]
        to = _rows(states[K][1], STATS, ALIGNED and LANES > 1, outer, middle, own_place)[:, None] + lanes
        tl.store(to, tl.broadcast_to(maximum[:, None], (ROWS, LANES)), mask=valid[:, None])
        to = _rows(states[K][2], STATS, ALIGNED and LANES > 1, outer, middle, own_place)[:, None] + lanes
        tl.store(to, tl.broadcast_to(total[:, None], (ROWS, LANES)), mask=valid[:, None])

    # Whole rows, GROUP of them at a time: the bytes of a row are asked for together. A side of weight 0 is not read. In
    # place of its product stands -0.0, which adds nothing to anything, not even to -0.0; where no side has a weight, 0.0.
    minus_zero = tl.full((1, 1), -1.0, tl.float32) * 0.0  # the literal -0.0 would become 0.0
    if ALIGNED:
        head_dim = head_dim // 8 * 8  # says that it is a multiple: what a mask lets through is then too
    for group in range(ROWS // GROUP):
        member = group * GROUP + tl.arange(0, GROUP)
        row = (tile % tiles) * ROWS + member
        own_row = row
        if HALF != "":
            own_row = tl.gather(own, member, 0)
        shares = ()
        sign = tl.full((GROUP, 1), 1.0, tl.float32)
        for k in tl.static_range(K):
            shares += (tl.gather(weights[k], member, 0)[:, None],)  # from the thread that has it
            sign = tl.where(shares[k] != 0.0, -1.0, sign)
        absent = sign * 0.0
        sources = (_rows(states[0][0], FIRST, ALIGNED, outer, middle, own_row)[:, None],)
        for k in tl.static_range(1, K):
            sources += (_rows(states[k][0], LATER, ALIGNED, outer, middle, row)[:, None],)
        target = _rows(states[K][0], FIRST, ALIGNED, outer, middle, own_row)[:, None]
        # One program for all of a row: another one could find its statistics overwritten.
        start = head_dim * 0
        while start < head_dim:
            column = (start + tl.arange(0, BLOCK_D))[None, :]
            inside = column < head_dim
            elements = ()
            for k in tl.static_range(K):  # all of them, before the first is needed
                elements += (tl.load(sources[k] + column, mask=inside & (shares[k] != 0.0), other=0.0),)
            merged = tl.where(shares[0] != 0.0, _widen(elements[0], STATS) * shares[0], absent)
            for k in tl.static_range(1, K):
                merged += tl.where(shares[k] != 0.0, _widen(elements[k], STATS) * shares[k], minus_zero)
            tl.store(target + column, _narrow(merged, FIRST, BY_INTEGERS), mask=inside & (row < inners)[:, None])
            start += BLOCK_D
