/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What is kept with a socket: the VIPs that it was given backends for. */
#ifndef SHUNT_KEPT_H
#define SHUNT_KEPT_H

#include "choose.h"

#define SOCKET_STORAGE(NAME, VALUE)                    \
	struct {                                       \
		__uint(type, BPF_MAP_TYPE_SK_STORAGE); \
		__uint(map_flags, BPF_F_NO_PREALLOC);  \
		__type(key, int);                      \
		__type(value, VALUE);                  \
	} NAME SEC(".maps")

/* Not hashes by the socket's cookie: those would have to be emptied when sockets close, or let
 * sockets of others push out what a live one needs. */
SOCKET_STORAGE(sock_peers, struct sock_flow);
SOCKET_STORAGE(sock_flows, struct sock_flows_val);

static __always_inline struct sock_flow flow_of(const struct sock_ask *ask,
						const struct sock_answer *answer)
{
	struct sock_flow flow = {
		.vip_port = ask->port,
		.port = answer->port,
		.backend = answer->backend,
		.seen_ns = ask->now_ns,
	};

	__builtin_memcpy(flow.vip, ask->vip, 16);
	__builtin_memcpy(flow.addr, answer->addr, 16);
	return flow;
}

static __always_inline bool is_from(const struct sock_flow *flow, const __u8 *addr, __be16 port)
{
	return flow->seen_ns && flow->port == port && same_address(flow->addr, addr);
}

static __always_inline bool is_to_vip(const struct sock_flow *flow, const struct sock_ask *ask)
{
	return flow->seen_ns && flow->vip_port == ask->port && same_address(flow->vip, ask->vip);
}

/* The index of the flow to this VIP; if there is none, where a new one may go. Not static: verified
 * once. */
__noinline int find_sent(const struct sock_flows_val *flows, const struct sock_ask *ask)
{
	int oldest = 0;
	__u64 seen_ns = ~0ULL;

	if (!flows || !ask)
		return 0;
	for (int i = 0; i < SOCK_FLOWS; i++) {
		const struct sock_flow *flow = &flows->flow[i];

		if (is_to_vip(flow, ask))
			return i;
		if (flow->seen_ns < seen_ns) {
			seen_ns = flow->seen_ns;
			oldest = i;
		}
	}
	return oldest;
}

static __always_inline struct sock_flow *sent_to(struct sock_flows_val *flows,
						 const struct sock_ask *ask)
{
	return &flows->flow[find_sent(flows, ask) & (SOCK_FLOWS - 1)];
}

/* Datagrams go to this address as it is: answers from there are not a VIP's any more. */
static __always_inline void forget_sent(struct sock_flows_val *flows, const struct sock_ask *ask)
{
	for (int i = 0; i < SOCK_FLOWS; i++) {
		struct sock_flow *flow = &flows->flow[i];

		if (flow->port == ask->port && same_address(flow->addr, ask->vip))
			flow->seen_ns = 0;
	}
}

#endif
