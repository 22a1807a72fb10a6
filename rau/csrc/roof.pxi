# The memory's roof, which speeds are shares of: a part of rau/_core.pyx.

cdef extern from "roof.h" nogil:
    void rau_roof(float *to, const float *const *from_, int arrays, Py_ssize_t n, Py_ssize_t runs, Py_ssize_t stride, int around,
                  int threads)


def roof(ndarray to not None, tuple arrays, bint around, int threads):
    """The memory's roof: ``to = arrays[0] + arrays[1] / 2 + ...``, a copy of one array, a triad of two. `around` the cache; in
    place is ``to is arrays[0]``. Arrays of shape (runs, n), the runs at the same distances in all of them."""
    cdef const float *addresses[16]
    cdef Py_ssize_t runs, n, step
    cdef ndarray array
    cdef int count = 0
    if not (
        _has_runs(to) and PyArray_ISBEHAVED(to) and 1 <= len(arrays) <= 16 and <uintptr_t>PyArray_DATA(to) % 64 == 0
        and (PyArray_DIMS(to)[0] < 2 or PyArray_STRIDES(to)[0] % 64 == 0)
    ):
        raise ValueError("roof: expected 1 to 16 arrays, and contiguous runs of `to`, float32, aligned to 64 bytes")
    runs, n, step = PyArray_DIMS(to)[0], PyArray_DIMS(to)[1], PyArray_STRIDES(to)[0]
    for array in arrays:
        if not (
            _has_runs(array) and PyArray_DIMS(array)[0] == runs and PyArray_DIMS(array)[1] == n
            and (runs < 2 or PyArray_STRIDES(array)[0] == step)
        ):
            raise ValueError(f"roof: expected arrays of {runs} runs of {n} elements, {step} bytes apart, as `to` has")
        addresses[count] = <const float *>PyArray_DATA(array)
        count += 1
    if runs == 0 or n == 0:
        return
    if threads > 1:
        threads = rau_team(threads, _stack_bytes)
    with nogil:
        rau_roof(<float *>PyArray_DATA(to), addresses, count, n, runs, step // 4, around, threads)


cdef inline bint _has_runs(ndarray array) noexcept:
    """Whether an array has shape (runs, n) and dtype float32, its runs contiguous."""
    return (
        array is not None and PyArray_TYPE(array) == NPY_FLOAT and PyArray_NDIM(array) == 2 and PyArray_ISBEHAVED_RO(array)
        and (PyArray_DIMS(array)[1] < 2 or PyArray_STRIDES(array)[1] == sizeof(float))
    )
