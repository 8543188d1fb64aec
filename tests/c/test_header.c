// SPDX-License-Identifier: Apache-2.0
/* combiner.h needs nothing before it and nothing but itself, in strict C11 and in C++; this file is both. */
#include "combiner.h"

#ifdef __cplusplus
static_assert(CMB_OK == 0, "success is zero");
#else
_Static_assert(CMB_OK == 0, "success is zero");
#endif

int main(void) {
    cmb_error error;
    return cmb_set_num_threads(1, &error) == CMB_OK && cmb_get_num_threads() == 1 ? 0 : 1;
}
