/* The row kernels for the version that RAU_VERSION, RAU_TARGET and RAU_BYTES name. They are written once; versions.h includes
   this once for each version, which is why there is no include guard and why every name goes by RAU_NAME. */

#include "vectors.h"
#include "weigh.h"
#include "merge.h"

static const rau_version RAU_NAME(rau_version) = {
    RAU_STRING(RAU_VERSION),
    RAU_NAME(weigh_f32), RAU_NAME(weigh_f64),
    {RAU_NAME(rows_f32), RAU_NAME(rows_f16), RAU_NAME(rows_bf16), RAU_NAME(rows_f64)}, /* in the order of rau_format */
    {RAU_NAME(rows_f32), RAU_NAME(rows_f32_f16), RAU_NAME(rows_f32_bf16)},
};

#undef CONVERT
#undef MASK
#undef FLOATS
#undef WORDS
#undef DOUBLES
#undef LONGS
#undef HALF_FLOATS
#undef SHORTS
#undef FLOATS_IN
#undef DOUBLES_IN
#undef SELECT
#undef ALL
#undef ALL_BITS
#undef GREATER
#undef EQUAL
#undef IS_NAN
#undef EACH_ROW
#undef GROUP
#undef UNIT
#undef UNIT_IN
#undef ALONG
#undef ACROSS
#undef RAU_VERSION
#undef RAU_TARGET
#undef RAU_BYTES
