/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* An array, as several programs declare and share them. */
#ifndef SHUNT_ARRAY_MAP_H
#define SHUNT_ARRAY_MAP_H

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#define ARRAY_MAP(NAME, VALUE, ENTRIES, FLAGS)    \
	struct {                                  \
		__uint(type, BPF_MAP_TYPE_ARRAY); \
		__uint(max_entries, ENTRIES);     \
		__uint(map_flags, FLAGS);         \
		__type(key, __u32);               \
		__type(value, VALUE);             \
	} NAME SEC(".maps")

#endif
