// SPDX-License-Identifier: Apache-2.0
/* The stages of each dtype. */
#include "tile/stages.h"

const cmb_stage_table *cmb_stage_table_of(cmb_dtype dtype) {
    static const cmb_stage_table *(*const stages[])(void) = {
        [CMB_FLOAT32] = cmb_stages_f32,
        [CMB_FLOAT64] = cmb_stages_f64,
        [CMB_BFLOAT16] = cmb_stages_bf16,
        [CMB_FLOAT16] = cmb_stages_f16,
    };
    return stages[dtype]();
}
