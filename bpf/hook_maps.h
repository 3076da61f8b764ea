/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The maps through which the balancer and a user's hook meet: all that both have. */
#ifndef SHUNT_HOOK_MAPS_H
#define SHUNT_HOOK_MAPS_H

#include "count.h"

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, HOOK_SLOTS);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(__u32));
} hooks SEC(".maps");

PERCPU_MAP(hook_view, struct hook_view, 1);

#endif
