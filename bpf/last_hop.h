/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* How a client's packets came: its replies go back that way. */
#ifndef SHUNT_LAST_HOP_H
#define SHUNT_LAST_HOP_H

#include "vlan.h"

/* A bond's native program is told the part of it that a packet came in by, which may have failed
 * when something is to be sent back. */
static __always_inline __u32 came_in_by(struct xdp_md *ctx)
{
	return config.bond ?: ctx->ingress_ifindex;
}

static __always_inline bool learn_hop(struct xdp_md *ctx, const struct packet *pkt,
				      struct last_hop *hop)
{
	struct ethhdr *eth = at(ctx, 0);

	if ((void *)(eth + 1) > end(ctx))
		return false;
	__builtin_memcpy(hop->peer, eth->h_source, ETH_ALEN);
	__builtin_memcpy(hop->own, eth->h_dest, ETH_ALEN);
	hop->pad0 = 0;
	hop->pad1 = 0;
	hop->ifindex = came_in_by(ctx);
	hop->tags = tags_of(pkt);
	return true;
}

static __always_inline bool same_hop(const struct last_hop *a, const struct last_hop *b)
{
	const __u64 *x = (const __u64 *)a, *y = (const __u64 *)b;

	return x[0] == y[0] && x[1] == y[1] && x[2] == y[2];
}

#endif
