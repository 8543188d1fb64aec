// SPDX-License-Identifier: Apache-2.0
/* What every strided array of the caller must satisfy. Internal. */
#ifndef CMB_ARRAY_H
#define CMB_ARRAY_H

#include "combiner.h"

/* Fails if `array` is absent, has another number of heads, or has an element whose offset cannot be addressed. Strides
 * may otherwise be anything. */
cmb_status cmb_check_array(const char *name, const cmb_array *array, int64_t B, int64_t heads, int64_t rows,
                           int64_t dim, cmb_error *error);

/* Whether two rows may share an element: true unless, with the axes in ascending order of their strides, each stride
 * steps over everything that the smaller axes span. */
bool cmb_rows_overlap(const cmb_array *array, int64_t B, int64_t rows, int64_t dim);

#endif
