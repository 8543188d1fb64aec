// SPDX-License-Identifier: Apache-2.0
/* What a problem must satisfy before the engine runs it. The first violation is returned as an error that names the
 * argument; the engine trusts all that passes. Internal. */
#ifndef CMB_CHECK_H
#define CMB_CHECK_H

#include "combiner.h"

/* Sizes, plans, segments, dropout, and every array of the problem that the call reads or writes. */
cmb_status cmb_check_problem(const cmb_problem *p, bool backward, cmb_error *error);

/* Every gradient that backward reads or writes. */
cmb_status cmb_check_gradients(const cmb_problem *p, const cmb_gradients *g, cmb_error *error);

/* That no output, of backward if g is not NULL, has rows that overlap one another. */
cmb_status cmb_check_outputs(const cmb_problem *p, const cmb_gradients *g, cmb_error *error);

#endif
