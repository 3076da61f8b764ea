/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Mode nat: a port of this host's towards a backend, claimed by putting the entry for its replies. */
#ifndef SHUNT_CLAIM_H
#define SHUNT_CLAIM_H

#include "parse.h"

#define EEXIST 17

/* Whether another flow has the port. One that has ended would be out of the way by now, but for the
 * dry run. */
static __always_inline bool is_taken(const struct packet *pkt, const struct nat_scratch *s)
{
	const struct nat_rev_val *there = bpf_map_lookup_elem(&nat_rev, &s->key);
	const __u64 *a, *b;

	if (!there)
		return false;
	a = (const __u64 *)there->client; /* and the VIP after it */
	b = (const __u64 *)s->rev.client;
	return a[0] != b[0] || a[1] != b[1] || a[2] != b[2] || a[3] != b[3] ||
	       there->client_port != s->rev.client_port || there->vip_port != s->rev.vip_port ||
	       !bpf_map_lookup_elem(&nat_fwd, &pkt->key);
}

static __always_inline int put_claim(const struct packet *pkt, const struct nat_scratch *s)
{
	if (DRY_RUN)
		return is_taken(pkt, s) ? -EEXIST : 0;
	return bpf_map_update_elem(&nat_rev, &s->key, &s->rev, BPF_NOEXIST);
}

#endif
