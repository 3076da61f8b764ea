/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Processes whose sockets see VIPs as they are: those in an excluded control group, or below one. */
#ifndef SHUNT_EXCLUDED_H
#define SHUNT_EXCLUDED_H

#include "choose.h"

/* The agent writes it, and again whenever such a group comes or goes. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, struct cgroup_key);
	__type(value, struct cgroup_val);
} sock_excluded SEC(".maps");

static __always_inline bool is_excluded_group(__u64 id)
{
	struct cgroup_key key = {.id = id};

	return bpf_map_lookup_elem(&sock_excluded, &key);
}

/* Of the process that calls, not of the socket's maker: a socket that is handed on is the receiver's
 * from then on. Only what is for a VIP comes here. */
static __always_inline bool in_excluded_group(void)
{
	for (int level = 1; level <= CGROUP_LEVELS; level++) {
		__u64 id = bpf_get_current_ancestor_cgroup_id(level);

		if (!id)
			break;
		if (is_excluded_group(id))
			return true;
	}
	return false;
}

#endif
