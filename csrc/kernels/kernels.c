// SPDX-License-Identifier: Apache-2.0
/* The table of kernels of each instruction set. */
#include "kernels/kernels.h"

#define TABLE_OF(name, NAME, table, suffix) [CMB_ISA_##NAME] = &table##_##name##_##suffix,
#define TABLES(type, table, suffix)                                              \
    const type *table##_for_##suffix(cmb_isa isa) {                              \
        static const type *const tables[] = {CMB_ISAS(TABLE_OF, table, suffix)}; \
        return tables[isa];                                                      \
    }

TABLES(cmb_kernels_f32, cmb_kernels, f32)
TABLES(cmb_kernels_f64, cmb_kernels, f64)
TABLES(cmb_narrow_format, cmb_narrow, bf16)
TABLES(cmb_narrow_format, cmb_narrow, f16)
