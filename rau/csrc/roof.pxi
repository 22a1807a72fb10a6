# The memory's roof, which speeds are shares of: a part of rau/_core.pyx.

cdef extern from "roof.h" nogil:
    void rau_roof(float *to, const float *const *from_, int arrays, Py_ssize_t n, Py_ssize_t runs, Py_ssize_t stride, int around,
                  int threads)


def roof(float[:, :] to, tuple arrays, bint around, int threads):
    """The memory's roof: ``to = arrays[0] + arrays[1] / 2 + ...``, a copy of one array, a triad of two. `around` the cache; in
    place is ``to is arrays[0]``. Arrays of shape (runs, n), the runs at the same distances in all of them."""
    cdef Py_ssize_t runs = to.shape[0], n = to.shape[1], step = to.strides[0]
    cdef const float *addresses[16]
    cdef const float[:, :] one
    cdef int count = 0
    if runs == 0 or n == 0:
        return
    if not 1 <= len(arrays) <= 16 or <uintptr_t>&to[0, 0] % 64 or (runs > 1 and step % 64) or (n > 1 and to.strides[1] != 4):
        raise ValueError("roof: expected 1 to 16 arrays, and contiguous runs of `to` aligned to 64 bytes")
    for array in arrays:
        one = array
        if (one.shape[0], one.shape[1]) != (runs, n) or (runs > 1 and one.strides[0] != step) or (n > 1 and one.strides[1] != 4):
            raise ValueError(f"roof: expected arrays of {runs} runs of {n} elements, {step} bytes apart, as `to` has")
        addresses[count] = &one[0, 0]
        count += 1
    if threads > 1:
        threads = rau_team(threads, _stack_bytes)
    with nogil:
        rau_roof(&to[0, 0], addresses, count, n, runs, step // 4, around, threads)
