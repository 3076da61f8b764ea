/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The balancer as `shunt explain` runs it: bpf/step.h. Of the same source and not of the same
 * object, since a constant that the verifier removes branches by is still loaded by every packet.
 */
#define DRY_RUN 1
#include "lb.bpf.c"
