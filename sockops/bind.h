/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Whether a bind() takes what a service has on this node's own addresses. A listener there would get
 * nothing that anybody sends it, and nobody would be told. One decision, whoever asks: the hooks of
 * bind(), and `shunt explain`.
 */
#ifndef SHUNT_BIND_H
#define SHUNT_BIND_H

#include "abi_sockets.h"
#include "frontend.h"

ARRAY_MAP(sock_node_ports, struct node_ports_val, 4096, BPF_F_MMAPABLE);

static __always_inline bool is_node_port(__u8 proto, __u32 port, bool ipv6)
{
	__u32 index = (ipv6 << 1 | (proto == IPPROTO_UDP)) << 10 | port >> 6;
	struct node_ports_val *p = bpf_map_lookup_elem(&sock_node_ports, &index);
	bool taken = p && p->bits >> (port & 63) & 1;

	step(STEP_NODE_PORT, taken, ipv6);
	return taken;
}

/* Every address of the node, so of IPv4's too unless the socket is for IPv6 alone. */
static __always_inline bool takes_any(const struct bind_ask *ask, __u32 port)
{
	return is_node_port(ask->proto, port, true) ||
	       (!ask->ipv6_only && is_node_port(ask->proto, port, false));
}

/* Whether a service that asks for this node's addresses has this one. Another's VIP may be one, too:
 * whoever serves that listens there. Not static: verified once. */
__noinline int is_of_node(const struct flow_key *key, __u32 services_mask)
{
	struct svc_val *service;
	__u64 unused;
	bool ipv6;
	__u32 id;

	if (!key)
		return 0;
	ipv6 = !is_mapped(key->daddr);
	id = look_up_service(key, ipv6, frontend_hash(key, ipv6, dport_proto_scope(key)),
			     services_mask, &unused);
	service = bpf_map_lookup_elem(&svc, &id);
	if (!id || !service)
		return 0;
	step(STEP_SERVICE, service->mode, service->flags);
	return !!(service->flags & SVC_NODE);
}

static __always_inline bool takes_node_port(const struct bind_ask *ask, __u32 services_mask)
{
	struct flow_key key __attribute__((aligned(8))) = {};
	const __u64 *half = (const __u64 *)ask->addr;
	__u32 port = bpf_ntohs(ask->port);
	bool ipv6 = !is_mapped(ask->addr);

	/* 0: the kernel chooses one, out of ip_local_port_range less ip_local_reserved_ports. */
	if (!port || (ask->proto != IPPROTO_TCP && ask->proto != IPPROTO_UDP))
		return false;
	if (ipv6 && !half[0] && !half[1])
		return takes_any(ask, port);
	if (!is_node_port(ask->proto, port, ipv6))
		return false;
	if (!ipv6 && !ipv4_of(ask->addr))
		return true;
	__builtin_memcpy(key.daddr, ask->addr, 16);
	set_ports(&key, 0, ask->port, ask->proto);
	return is_of_node(&key, services_mask);
}

/* enum sock_reason of a bind(). Node ports are those of one network namespace, `own`, whatever
 * `sockets` covers. */
static __always_inline __u32 try_bind(const struct bind_ask *ask, __u64 own, __u32 services_mask)
{
	if (ask->netns != own)
		return SOCK_PASS_NAMESPACE;
	return takes_node_port(ask, services_mask) ? SOCK_REFUSED_NODE_PORT : SOCK_PASS_BIND;
}

#endif
