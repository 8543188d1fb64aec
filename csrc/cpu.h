// SPDX-License-Identifier: Apache-2.0
/* What the machine offers: instruction sets and processors. Internal. */
#ifndef CMB_CPU_H
#define CMB_CPU_H

typedef enum { CMB_ISA_BASE, CMB_ISA_AVX2, CMB_ISA_AVX512, CMB_ISA_AVX512_BF16, CMB_ISA_NEON } cmb_isa;

/* The instruction set whose kernels run: read it once per call, so that a call never mixes two. */
cmb_isa cmb_isa_current(void);

/* Processors this process may use: its affinity, capped by the quota of its cgroup (v1 or v2) and that
 * cgroup's ancestors, rounded up; at least 1. The cgroup files are looked for below `root`: "" but in tests. */
int cmb_processors(const char *root);

#endif
