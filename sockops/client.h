/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Whether the service serves the client that a socket is. */
#ifndef SHUNT_CLIENT_H
#define SHUNT_CLIENT_H

#include "choose.h"
#include "sources.h"

/* `own`: the address that the socket is bound to, or zero. `netns`: this node's own. */
static __always_inline __u32 check_source(const struct sock_ask *ask,
					  const struct sock_answer *answer, __u8 *own, __u64 netns)
{
	__u64 *half = (__u64 *)own;
	struct nexthop_val *hop;
	struct backend_val *b;
	__u32 index;

	/* Not bound: of this node's own sockets the agent knows the address that they will have. */
	if (!half[0] && (!half[1] || is_mapped(own)) && !ipv4_of(own)) {
		index = answer->backend;
		b = bpf_map_lookup_elem(&backends, &index);
		if (!b || ask->netns != netns)
			return SOCK_PASS_SOURCE_UNKNOWN;
		index = b->nexthop;
		hop = bpf_map_lookup_elem(&nexthops, &index);
		if (!hop)
			return SOCK_PASS_SOURCE_UNKNOWN;
		__builtin_memcpy(own, hop->saddr, 16);
		if (!half[0] && !half[1])
			return SOCK_PASS_SOURCE_UNKNOWN;
	}
	return source_allowed(own, answer->sources) ? answer->reason : SOCK_REFUSED_SOURCE;
}

#endif
