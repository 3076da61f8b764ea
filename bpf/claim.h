/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Mode nat: a port of this host's towards a backend, claimed by putting the entry for its replies. */
#ifndef SHUNT_CLAIM_H
#define SHUNT_CLAIM_H

#include "parse.h"
#include "siphash.h"

#define EEXIST	     17
#define NAT_ATTEMPTS 32

struct translation {
	struct flow_key to __attribute__((aligned(8))); /* the tuple as it leaves */
	__u32 backend;
};

static __always_inline void reverse(const struct flow_key *key, struct flow_key *out)
{
	__builtin_memcpy(out->saddr, key->daddr, 16);
	__builtin_memcpy(out->daddr, key->saddr, 16);
	out->sport = key->dport;
	out->dport = key->sport;
	out->proto = key->proto;
	out->scope = key->scope;
	out->kind = FLOW_KIND_FLOW;
	out->pad = 0;
}

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

/* Puts in the reverse entry of `t`, NOEXIST; its key is left in the scratch memory. Returns 0, or
 * -EEXIST if somebody has that tuple, or another error if the table is full. */
static __always_inline int claim(const struct packet *pkt, const struct translation *t,
				 struct nat_scratch *s)
{
	reverse(&t->to, &s->key);
	s->rev.word = (__u64)whole_hash(&s->key, !is_mapped(s->key.saddr)) << 32 | t->backend;
	return put_claim(pkt, s);
}

/* 6.1 has 32 bytes of stack for it. */
static __noinline void count_refused_towards(const struct flow_key *to)
{
	struct masq_refused_key key = {.port = to->dport, .proto = to->proto};
	struct nat_refused_val one = {.flows = 1}, *n;

	__builtin_memcpy(key.addr, to->daddr, 16);
	if (!bpf_map_update_elem(&masq_refused, &key, &one, BPF_NOEXIST))
		return;
	n = bpf_map_lookup_elem(&masq_refused, &key);
	if (n)
		__sync_fetch_and_add(&n->flows, 1);
}

static __always_inline void count_refused(const struct translation *t)
{
	__u32 backend = t->backend;
	struct nat_refused_val *n;

	if (DRY_RUN)
		return;
	if (AT_TC && !backend) {
		count_refused_towards(&t->to);
		return;
	}
	n = bpf_map_lookup_elem(&nat_refused, &backend);
	if (n)
		__sync_fetch_and_add(&n->flows, 1);
}

/* The client's own port, or none: see bpf/sctp.h. */
static __always_inline bool claim_own_port(const struct packet *pkt, struct translation *t,
					   struct nat_scratch *s, enum reason *why)
{
	int err;

	t->to.sport = pkt->key.sport;
	err = claim(pkt, t, s);
	*why = err == -EEXIST ? REASON_DROP_NAT_SCTP_PORT : REASON_DROP_NAT_TABLE_FULL;
	if (err == -EEXIST)
		count_refused(t);
	return !err;
}

/* Somebody else's: a frontend's on an address of this host, or a process's that waits there. An identifier
 * of ICMP is nobody's. */
static __noinline bool is_excluded(__u8 proto, __u16 port)
{
	__u32 index = port_word(proto, port);
	struct ports_val *p;

	if (proto != IPPROTO_TCP && proto != IPPROTO_UDP)
		return false;
	p = bpf_map_lookup_elem(&nat_excluded, &index);
	return p && p->bits >> (port & 63) & 1;
}

/* Claims a port towards the backend; returns whether one was had, else `*why`. */
static __noinline bool claim_port(const struct packet *pkt, struct translation *t,
				  struct nat_scratch *s, enum reason *why)
{
	if (AT_TC && pkt->key.proto == IPPROTO_SCTP)
		return claim_own_port(pkt, t, s, why);
	*why = REASON_DROP_NAT_NO_PORT;
	/* 64 bits wide: a 32-bit counter, spilled, is unknown to the verifier (6.18, clang 14:
	 * "infinite loop detected"). */
	for (__u64 attempt = 0; attempt < NAT_ATTEMPTS; attempt++) {
		__u32 random = port_hash(&pkt->key, attempt) >> 32;
		__u16 port = config.nat_port_min + ((__u64)random * config.nat_port_count >> 32);
		int err; /* before 6.4 only the lower half of a map function's result is its own */

		t->to.sport = bpf_htons(port);
		err = is_excluded(pkt->key.proto, port) ? -EEXIST : claim(pkt, t, s);
		if (!err)
			return true;
		if (err != -EEXIST) {
			*why = REASON_DROP_NAT_TABLE_FULL;
			return false;
		}
		note(EVENT_NAT_COLLISION);
	}
	count_refused(t);
	return false;
}

#endif
