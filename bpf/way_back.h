/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * On a backend: what decap remembers for the answers. A flow that came through Geneve is for an address
 * of this host's own; which VIP the client has sent it to stands in map ways_back, until the flow has
 * been silent for a time that depends on what was seen of it:
 *
 *   opening   only a SYN                         60 s
 *   open                                      8,000 s
 *   closing   one end's FIN                   3,600 s
 *   over      both ends' FIN, or an RST          60 s
 *   UDP                                          60 s
 *
 * The map is no LRU: nothing evicts a live flow. What is over is found out when it is looked up, and
 * when a new flow has no room. A timer for each would be neater, but on Linux 6.18 one that a
 * packet makes fails now and then for want of memory (measured: one in 20).
 */
#ifndef SHUNT_WAY_BACK_H
#define SHUNT_WAY_BACK_H

#include <linux/tcp.h>

#include "count.h"
#include "memory.h"
#include "packet.h"

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

/* A silent flow's time is measured to this fraction of it. */
#define LIFE_SHIFT 6

#define S_TO_NS 1000000000ULL

const volatile struct decap_config config = {
	.lives =
		{
			.opening_ns = 60 * S_TO_NS,
			.open_ns = 8000 * S_TO_NS,
			.closing_ns = 3600 * S_TO_NS,
			.over_ns = 60 * S_TO_NS,
			.udp_ns = 60 * S_TO_NS,
		},
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct way_key);
	__type(value, struct way_val);
} ways_back SEC(".maps");

/* The VIPs whose packets came with outer headers: their SYN-ACKs have to leave room for those. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct tunneled_key);
	__type(value, struct tunneled_val);
} tunneled SEC(".maps");

PERCPU_MAP(decap_reasons, struct count, DECAP_COUNT);

/* See abi_types in maps.h. */
struct {
	enum decap_reason decap_reason;
	enum way_flag way_flag;
} decap_types SEC(".data.layout");

static __always_inline bool same_address(const __u8 *a, const __u8 *b)
{
	const __u64 *x = (const __u64 *)a, *y = (const __u64 *)b;

	return x[0] == y[0] && x[1] == y[1];
}

/* Says of a value whether it is this key's. Not 0, as the memory of an element is that never had one. */
static __always_inline __u64 way_check(const struct way_key *key)
{
	const __u64 *word = (const __u64 *)key;
	__u64 sum = 0x9e3779b97f4a7c15ULL;

	for (__u32 i = 0; i < sizeof(*key) / 8; i++)
		sum = (sum ^ word[i]) * 0xff51afd7ed558ccdULL;
	return sum | 1;
}

static __always_inline bool way_over(__u32 flags)
{
	const __u32 both = WAY_FIN_CLIENT | WAY_FIN_BACKEND;

	return flags & WAY_RST || (flags & both) == both;
}

static __always_inline __u64 way_life(__u32 flags, __u8 proto)
{
	if (proto == IPPROTO_UDP)
		return config.lives.udp_ns;
	if (way_over(flags))
		return config.lives.over_ns;
	if (flags & (WAY_FIN_CLIENT | WAY_FIN_BACKEND))
		return config.lives.closing_ns;
	return flags & WAY_OPEN ? config.lives.open_ns : config.lives.opening_ns;
}

static __always_inline bool way_ended(const struct way_val *val, __u8 proto, __u64 now)
{
	__u64 life = way_life(READ_ONCE(val->flags), proto);

	return (__s64)(now - READ_ONCE(val->seen_ns)) >= (__s64)life;
}

static __always_inline struct way_val *find_way(const struct way_key *key)
{
	struct way_val *val = bpf_map_lookup_elem(&ways_back, key);

	if (!val || val->check != way_check(key) || way_ended(val, key->proto, bpf_ktime_get_ns()))
		return NULL;
	return val;
}

/* What a packet says of its flow; `fin` is the flag of whoever has sent it. */
static __always_inline __u32 way_flags(__u8 tcp_flags, __u32 fin)
{
	return (tcp_flags & TCP_RST ? WAY_RST : 0) | (tcp_flags & TCP_FIN ? fin : 0);
}

/* A packet of the flow. */
static __always_inline void touch_way(struct way_val *val, __u8 proto, __u32 add)
{
	__u32 flags = READ_ONCE(val->flags);
	__u64 now = bpf_ktime_get_ns(), silent = now - READ_ONCE(val->seen_ns);

	if (add & ~flags)
		__sync_fetch_and_or(&val->flags, add);
	if ((__s64)silent > (__s64)(way_life(flags | add, proto) >> LIFE_SHIFT))
		WRITE_ONCE(val->seen_ns, now);
}

#endif
