/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Counters: per processor, so that counting is an addition and nothing else. */
#ifndef SHUNT_COUNT_H
#define SHUNT_COUNT_H

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "abi.h"
#include "likely.h"

#define PERCPU_MAP(NAME, VALUE, ENTRIES)                 \
	struct {                                         \
		__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY); \
		__uint(max_entries, ENTRIES);            \
		__type(key, __u32);                      \
		__type(value, VALUE);                    \
	} NAME SEC(".maps")

static __always_inline void count(void *map, __u32 index, __u32 bytes)
{
	struct count *n = bpf_map_lookup_elem(map, &index);

	if (likely(n)) {
		n->packets++;
		n->bytes += bytes;
	}
}

#endif
