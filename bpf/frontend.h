/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Which service has an address and port: the way through maps ports and services. */
#ifndef SHUNT_FRONTEND_H
#define SHUNT_FRONTEND_H

#include <stdbool.h>

#include "memory.h"
#include "packet.h"
#include "step.h"
#include "tables.h"

/* Half of MurmurHash3's 64-bit finalizer (public domain): three operations a word. */
static __always_inline __u64 stir(__u64 x)
{
	x ^= x >> 33;
	x *= 0xff51afd7ed558ccdULL;
	return x ^ x >> 33;
}

/* Stored as one word, since words are what is read of it. Little-endian. */
static __always_inline void set_ports(struct flow_key *key, __be16 sport, __be16 dport, __u8 proto)
{
	*(__u64 *)&key->dport =
		(__u64)sport << 32 | (__u32)SCOPE_EXTERNAL << 24 | (__u32)proto << 16 | dport;
}

static __always_inline __u32 dport_proto_scope(const struct flow_key *key)
{
	return *(const __u64 *)&key->dport;
}

/* Of the frontend with this port, protocol and scope: where map services has it. lb/frontends.py
 * computes the same. */
static __always_inline __u64 frontend_hash(const struct flow_key *key, bool ipv6, __u32 tail)
{
	const __u64 *d = (const __u64 *)key->daddr;

	if (!ipv6)
		return stir((__u64)ipv4_of(key->daddr) << 32 | tail);
	return stir(stir(stir(d[0]) ^ d[1]) ^ tail);
}

/* Where a set of ports has one of protocol 6, 17 or 132: in the first, second or third 1,024 words. */
static __always_inline __u32 port_word(__u8 proto, __u32 port)
{
	return ((proto >> 4 & 1) | (proto >> 6 & 2)) << 10 | port >> 6;
}

static __always_inline bool is_port_of_ours(__u8 proto, __u32 port)
{
	__u32 index = port_word(proto, port);
	struct ports_val *p = bpf_map_lookup_elem(&ports, &index);

	return p && p->bits >> (port & 63) & 1;
}

static __always_inline bool is_served(const struct flow_key *key)
{
	return is_port_of_ours(key->proto, bpf_ntohs(key->dport));
}

/* The service of the frontend with this port, protocol and scope; 0 = none. */
static __always_inline __u32 find_frontend(const struct flow_key *key, __u32 tail, __u32 hash,
					   __u32 mask, __u64 *shortcut)
{
	const __u64 *vip = (const __u64 *)key->daddr;
	__u32 reach = 0;

	for (__u32 n = 0; n <= SVC_REACH_MAX; n++) {
		__u32 index = (hash + n) & mask;
		struct svc_line *line = bpf_map_lookup_elem(&services, &index);

		if (!line)
			return 0;
		if (!n)
			reach = READ_ONCE(line->entry[0].svc_reach) >> SVC_REACH_SHIFT;
		for (int i = 0; i < SVC_LINE_ENTRIES; i++) {
			const __u64 *words = (const __u64 *)&line->entry[i];
			/* Key and service in one load, as they are written. Little-endian. */
			__u64 last = READ_ONCE(words[2]);

			if (likely((__u32)last == tail) && words[0] == vip[0] &&
			    words[1] == vip[1]) {
				*shortcut = READ_ONCE(words[3]);
				return last >> 32 & ((1 << SVC_REACH_SHIFT) - 1);
			}
		}
		if (n >= reach)
			break;
	}
	return 0;
}

static __always_inline __u32 any_port_of(__u8 proto)
{
	return proto == IPPROTO_TCP ? ANY_PORT_TCP :
	       proto == IPPROTO_UDP ? ANY_PORT_UDP :
				      ANY_PORT_SCTP;
}

/* Of a frontend that has every port of its VIP. */
static __noinline __u32 find_any_port(const struct flow_key *key, bool ipv6, __u32 mask)
{
	__u32 zero = 0, tail = dport_proto_scope(key) & ~0xffffU; /* little-endian */
	struct meta_val *m = bpf_map_lookup_elem(&meta, &zero);
	__u64 unused;

	if (!m || !(m->any_port & any_port_of(key->proto)))
		return 0;
	tail = find_frontend(key, tail, frontend_hash(key, ipv6, tail), mask, &unused);
	step(STEP_FRONTEND, tail, 1);
	return tail;
}

/* The service of a key's daddr, dport and proto; 0 = none. `hash` is the key's frontend_hash(), `mask`
 * the number of map services' lines, less one. */
static __always_inline __u32 look_up_service(const struct flow_key *key, bool ipv6, __u32 hash,
					     __u32 mask, __u64 *shortcut)
{
	__u32 svc = find_frontend(key, dport_proto_scope(key), hash, mask, shortcut);

	step(STEP_FRONTEND, svc, 0);
	return svc ?: find_any_port(key, ipv6, mask);
}

#endif
