/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* TC's programs as `shunt explain` runs them: see xdp/dry.bpf.c. */
#define DRY_RUN 1
#include "translate.bpf.c"
