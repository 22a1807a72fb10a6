# The memory's roof, which speeds are shares of: a part of rau/_core.pyx.

cdef extern from "roof.h" nogil:
    void rau_roof(float *to, const float *const *from_, int arrays, Py_ssize_t n, int around, int threads)


def roof(float[::1] to, tuple arrays, bint around, int threads):
    """The memory's roof: ``to = arrays[0] + arrays[1] / 2 + ...``, a copy of one array, a triad of two. `around` the cache; in
    place is ``to is arrays[0]``."""
    cdef Py_ssize_t n = to.shape[0]
    cdef const float *addresses[16]
    cdef const float[::1] one
    cdef int count = 0
    if n == 0:
        return
    if not 1 <= len(arrays) <= 16 or <uintptr_t>&to[0] % 64:
        raise ValueError("roof: expected 1 to 16 arrays, and `to` aligned to 64 bytes")
    for array in arrays:
        one = array
        if one.shape[0] != n:
            raise ValueError(f"roof: expected arrays of {n} elements, as `to` has, got {one.shape[0]}")
        addresses[count] = &one[0]
        count += 1
    if threads > 1:
        threads = rau_team(threads, _stack_bytes)
    with nogil:
        rau_roof(&to[0], addresses, count, n, around, threads)
