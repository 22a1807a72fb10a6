# The memory's roof, which speeds are shares of: a part of rau/_core.pyx.

cdef extern from "roof.h" nogil:
    void rau_roof(float *to, const float *a, const float *b, Py_ssize_t n, int around, int threads)


def roof(float[::1] to, const float[::1] a, const float[::1] b, bint around, int threads):
    """The memory's roof: ``to = a + b / 2``, or a copy where b is None. `around` the cache; in place is ``to is a``."""
    cdef Py_ssize_t n = to.shape[0]
    if n == 0:
        return
    if a.shape[0] != n or (b is not None and b.shape[0] != n) or <uintptr_t>&to[0] % 64:
        raise ValueError("roof: expected arrays of one length, and `to` aligned to 64 bytes")
    cdef const float *second = NULL
    if b is not None:
        second = &b[0]
    if threads > 1:
        threads = rau_team(threads, _stack_bytes)
    with nogil:
        rau_roof(&to[0], &a[0], second, n, around, threads)
