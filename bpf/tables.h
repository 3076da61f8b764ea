/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The compiled tables: who serves what. Whatever balances, packets or sockets, reads these. */
#ifndef SHUNT_TABLES_H
#define SHUNT_TABLES_H

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "abi.h"
#include "array_map.h"

ARRAY_MAP(meta, struct meta_val, 1, BPF_F_MMAPABLE);
ARRAY_MAP(ports, struct ports_val, 3072, BPF_F_MMAPABLE);
ARRAY_MAP(services, struct svc_line, 1024, BPF_F_MMAPABLE);
ARRAY_MAP(svc, struct svc_val, 1024, BPF_F_MMAPABLE);
ARRAY_MAP(svc_options, struct svc_options, 1024, BPF_F_MMAPABLE);
ARRAY_MAP(slots, struct slot_val, 1024, BPF_F_MMAPABLE);
ARRAY_MAP(backends, struct backend_val, 1024, BPF_F_MMAPABLE);
ARRAY_MAP(nexthops, struct nexthop_val, 1024, BPF_F_MMAPABLE);

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 1024);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct source_key);
	__type(value, struct source_val);
} sources SEC(".maps");

#endif
