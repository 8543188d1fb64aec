// SPDX-License-Identifier: Apache-2.0
/* What the binding hands to JAX. */
#ifndef CMB_XLA_H
#define CMB_XLA_H

#include "combiner.h"

#include "xla/ffi/api/c_api.h"

XLA_FFI_Error *cmb_xla_forward(XLA_FFI_CallFrame *frame);
XLA_FFI_Error *cmb_xla_backward(XLA_FFI_CallFrame *frame);

/* Lets handlers find a plan by a number that follows from its contents. The plan must live as long as the process: XLA
 * may run what it has compiled up to the end. False where memory is out. Any thread may call it at any time. */
bool cmb_xla_keep_plan(int64_t digest, const cmb_plan *plan);

#endif
