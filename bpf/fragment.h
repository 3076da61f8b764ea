/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Fragments follow the first one, which alone has the ports. It is a packet like any other; where it
 * went is remembered for the others. What comes before it is the stack's, and counted if it is for a VIP.
 */
#ifndef SHUNT_FRAGMENT_H
#define SHUNT_FRAGMENT_H

#include "look.h"

/* As long as Linux waits for the rest of an IPv4 datagram (net.ipv4.ipfrag_time). */
#define FRAGMENT_IDLE_NS (30 * NS_PER_S)

static __always_inline void fragment_key_of(const struct packet *pkt, struct fragment_key *key)
{
	__builtin_memcpy(key->saddr, pkt->key.saddr, 16);
	__builtin_memcpy(key->daddr, pkt->key.daddr, 16);
	key->id = pkt->fragment_id;
	key->proto = pkt->ipv6 ? 0 : pkt->key.proto;
	key->way = pkt->way;
	key->pad0 = 0;
}

/* The first fragment was sent on: to a backend, or (0) as a reply to a client. */
__noinline int remember_first(const struct packet *pkt, __u32 svc_id, __u32 backend)
{
	struct fragment_val val = {.seen_ns = now_ns(), .svc = svc_id, .backend = backend};
	struct nat_scratch *s = own_scratch();

	if (!pkt || !s)
		return 0;
	fragment_key_of(pkt, &s->fragment);
	val.sport = pkt->key.sport;
	val.dport = pkt->key.dport;
	val.proto = pkt->key.proto;
	val.hash = pkt->hash;
	step(STEP_FRAGMENT_FIRST, svc_id, backend);
	note(EVENT_FRAGMENT_FIRST);
	return !DRY_RUN && !bpf_map_update_elem(&fragments, &s->fragment, &val, BPF_ANY);
}

/* Nothing is known of the datagram of a fragment for a VIP: it came before its first, which may also have
 * been refused, or forgotten. Counted by the program that would have followed it. */
static __always_inline void note_early(const struct packet *pkt, const struct nat_scratch *s)
{
	struct echo_val *vip = bpf_map_lookup_elem(&echo, s->fragment.daddr);

	if (vip && pkt->way != WAY_TC_OUT && (vip->svc & VIP_AT_TC ? AT_TC : !AT_TC))
		note(EVENT_FRAGMENT_EARLY);
}

/* A fragment that is not its datagram's first: where that went. */
__noinline __u64 look_fragment(struct CONTEXT *ctx, struct packet *pkt)
{
	struct nat_scratch *s = own_scratch();
	struct fragment_val *first;
	struct svc_val *service;

	if (!pkt || !s || !fits_frame(ctx, pkt))
		return LOOK_NOTHING;
	fragment_key_of(pkt, &s->fragment);
	first = bpf_map_lookup_elem(&fragments, &s->fragment);
	if (!first) {
		note_early(pkt, s);
		return LOOK_NOTHING;
	}
	if ((__s64)(now_ns() - first->seen_ns) > (__s64)FRAGMENT_IDLE_NS) {
		note(EVENT_FRAGMENT_LATE);
		return LOOK_NOTHING;
	}
	pkt->rest = true;
	set_ports(&pkt->key, first->sport, first->dport, first->proto);
	pkt->hash = first->hash;
	s->svc = first->svc;
	s->backend = first->backend;
	if (!s->backend)
		return look_reverse(pkt, s) || look_masqueraded(pkt, s) ?
			       LOOK_FOUND :
			       word_of(verdict(XDP_DROP, REASON_DROP_NAT_NO_FLOW));
	service = bpf_map_lookup_elem(&svc, &s->svc);
	s->mode = service ? service->mode : MODE_NONE;
	if (s->mode == MODE_NONE)
		return word_of(verdict(XDP_DROP, REASON_DROP_BAD_TABLE));
	if ((AT_TC || s->mode == MODE_NAT) && !look_forward(pkt, s))
		return word_of(verdict(XDP_DROP, REASON_DROP_NAT_NO_FLOW));
	return LOOK_FOUND;
}

#endif
