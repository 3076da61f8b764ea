/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* A packet whose headers parse() could not read: whether it would have been translated, were it whole.
 * Then it must not go on as it is. */
#ifndef SHUNT_MALFORMED_H
#define SHUNT_MALFORMED_H

#include "look.h"
#include "masquerade.h"
#include "select.h"

/*
 * Refused, in this order:
 *   what leaves by a device and from a source that are masqueraded
 *   what of TCP, UDP or SCTP does not even have ports: no host can take it, and whose it is cannot be told
 *   what is part of a translated flow, at either hook
 *   what is for a frontend
 *
 * The rest is none of ours. Not static: verified once.
 */
__noinline int refuses_malformed(struct __sk_buff *ctx, struct packet *pkt)
{
	struct nat_scratch *s = own_scratch();
	struct echo_key vip __attribute__((aligned(8)));
	__be16 ports[2];
	__u32 stop;

	if (!pkt || !s)
		return false;
	if (pkt->way == WAY_TC_OUT && is_masqueraded(ctx, pkt))
		return true;
	if (!has_ports(pkt->key.proto)) {
		/* Extension headers that end too soon, or beyond what is read of a frame. */
		__builtin_memcpy(vip.vip, pkt->key.daddr, 16);
		return pkt->way == WAY_TC_IN && bpf_map_lookup_elem(&echo, &vip);
	}
	/* What the host's own offloads have put together may be longer than a header can say (BIG TCP). */
	stop = ctx->gso_size ? ctx->len : ETH_HLEN + pkt->ip_len;
	if (pkt->l4 + sizeof(ports) > stop ||
	    bpf_skb_load_bytes(ctx, pkt->l4, ports, sizeof(ports)))
		return true;
	set_ports(&pkt->key, ports[0], ports[1], pkt->key.proto);
	pkt->frontend = frontend_hash(&pkt->key, pkt->ipv6, dport_proto_scope(&pkt->key));
	pkt->hash = flow_hash(&pkt->key, pkt->ipv6, pkt->frontend);
	s->key = pkt->key;
	if (look_back(&s->key, pkt->hash, s))
		return true;
	return pkt->way == WAY_TC_IN && find_service(pkt);
}

#endif
