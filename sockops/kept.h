/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What is kept with a socket: the VIPs that it was given backends for. */
#ifndef SHUNT_KEPT_H
#define SHUNT_KEPT_H

#include "choose.h"
#include "storage.h"

/* Not hashes by the socket's cookie: those would have to be emptied when sockets close, or let
 * sockets of others push out what a live one needs. */
SOCKET_STORAGE(sock_peers, struct sock_flow);
SOCKET_STORAGE(sock_flows, struct sock_flows_val);

struct mptcp_sock;

/* Where a connection's VIP is kept. connect() is seen on the one TCP socket that a socket of Multipath
 * TCP begins with, getpeername() on that socket as a whole. */
static __always_inline struct sock_flow *new_peer(struct bpf_sock *sk, bool mptcp)
{
	struct mptcp_sock *whole = mptcp ? bpf_skc_to_mptcp_sock(sk) : NULL;

	if (whole)
		return bpf_sk_storage_get(&sock_peers, whole, 0, BPF_SK_STORAGE_GET_F_CREATE);
	return bpf_sk_storage_get(&sock_peers, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
}

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

/* What a socket that names an address has for it as its peer. No program is told when a socket is
 * disconnected: then it goes on as a flow like others, so that what is sent to the backend as itself
 * is not shown as the VIP's. */
static __always_inline void recall_peer(struct bpf_sock *sk, struct sock_ask *ask)
{
	struct sock_flow *peer = bpf_sk_storage_get(&sock_peers, sk, 0, 0);
	bool connected = sk->state == BPF_TCP_ESTABLISHED;

	if (peer && is_to_vip(peer, ask)) {
		ask->kept = *peer;
		if (connected) /* answers from elsewhere would not be taken */
			ask->kept.seen_ns = ask->now_ns;
	}
	if (peer && !connected)
		bpf_sk_storage_delete(&sock_peers, sk);
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
