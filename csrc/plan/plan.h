// SPDX-License-Identifier: Apache-2.0
/* The steps from a plan's arrays to a finished plan. Internal. */
#ifndef CMB_PLAN_H
#define CMB_PLAN_H

#include "plan/read.h"
#include "runtime/cancel.h"
#include "runtime/memory.h"

/* As the public functions without `cancel`, which here is the cancel of the call that they are a part of. */
cmb_status cmb_check_plan(const cmb_plan *plan, cmb_cancel *cancel, cmb_error *error);
/* A plan of its own memory, with its traits, from arrays that are known to be right. A step of a decoder, which runs
 * its plan once and without the engine, asks for no trait: there `is_step` leaves them out. */
cmb_status cmb_copy_plan(const cmb_plan *from, bool is_step, cmb_cancel *cancel, cmb_plan **plan, cmb_error *error);
/* Finds plan->traits, whose arrays begin at `rows`: query_row and, if regions pick, pick and reused_rows behind it.
 * key_row has a block of its own. */
cmb_status cmb_derive_traits(cmb_plan *plan, int32_t *rows, cmb_cancel *cancel, cmb_error *error);

/* Finds traits.sharing, once is_fusible is known. */
void cmb_find_sharing(cmb_plan *plan, cmb_cancel *cancel);

/* memcpy in pieces, between which a cancel is heard: the first touch of memory is slow. */
void cmb_copy_bytes(cmb_cancel *cancel, void *to, const void *from, size_t bytes);

#endif
