/* All kernels for one instruction set; native.c includes this once per set, with SUFFIX, LANES, ROWS, GROUP and WIDE. */
#include "vector.h"
#include "linear.h"
#include "norm.h"
#include "attend.h"
#include "summary.h"
#include "sparse.h"

#undef SUFFIX
#undef LANES
#undef ROWS
#undef GROUP
#undef WIDE
