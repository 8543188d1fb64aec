// SPDX-License-Identifier: Apache-2.0
/* How a function reports an error, and the assertions of what its caller owes it. Internal. */
#ifndef CMB_STATUS_H
#define CMB_STATUS_H

#include "combiner.h"

/* Fills *error (where it is not NULL) and returns `status`. */
cmb_status cmb_fail(cmb_error *error, cmb_status status, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* Returns from the calling function if `call` failed. */
#define TRY(call)                          \
    do {                                   \
        const cmb_status status_ = (call); \
        if (status_ != CMB_OK)             \
            return status_;                \
    } while (0)

/* A precondition that the library's own code must have established. The sanitizer builds define CMB_ASSERTS and end the
 * process where it does not hold; other builds evaluate nothing. */
#ifdef CMB_ASSERTS
#undef NDEBUG
#include <assert.h>
#define CMB_ASSERT(condition) assert(condition)
#else
#define CMB_ASSERT(condition) ((void)sizeof(!(condition)))
#endif

#endif
