/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Whether a bind() takes what a service has on this node's own addresses. A listener there would get
 * nothing that anybody sends it, and nobody would be told.
 */
#ifndef SHUNT_BIND_H
#define SHUNT_BIND_H

#include "address.h"
#include "choose.h"
#include "family.h"

ARRAY_MAP(sock_node_ports, struct node_ports_val, 4096, BPF_F_MMAPABLE);

/* A page: as many as are told in a second. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096);
} sock_refused SEC(".maps");

static __always_inline bool is_node_port(__u8 proto, __u32 port, bool ipv6)
{
	__u32 index = (ipv6 << 1 | (proto == IPPROTO_UDP)) << 10 | port >> 6;
	struct node_ports_val *p = bpf_map_lookup_elem(&sock_node_ports, &index);

	return p && p->bits >> (port & 63) & 1;
}

/* Every address of the node, so of IPv4's too unless the socket is for IPv6 alone. */
static __always_inline bool takes_any(struct bpf_sock_addr *ctx, bool ipv6, __u32 port)
{
	if (!ipv6)
		return is_node_port(ctx->protocol, port, false);
	if (is_node_port(ctx->protocol, port, true))
		return true;
	return is_node_port(ctx->protocol, port, false) && !is_ipv6_only(ctx->sk, ctx->protocol);
}

/* Not static: verified once. */
__noinline int has_service(const struct flow_key *key, __u32 services_mask)
{
	__u64 unused;
	bool ipv6;

	if (!key)
		return 0;
	ipv6 = !is_mapped(key->daddr);
	return look_up_service(key, ipv6, frontend_hash(key, ipv6, dport_proto_scope(key)),
			       services_mask, &unused);
}

static __always_inline bool takes_node_port(struct bpf_sock_addr *ctx, bool ipv6, const __u8 *addr,
					    __u32 services_mask)
{
	struct flow_key key __attribute__((aligned(8))) = {};
	const __u64 *half = (const __u64 *)addr;
	__u32 port = bpf_ntohs(ctx->user_port);
	bool of_ipv6 = !is_mapped(addr);

	/* 0: the kernel chooses one, out of ip_local_port_range less ip_local_reserved_ports. */
	if (!port || (ctx->protocol != IPPROTO_TCP && ctx->protocol != IPPROTO_UDP))
		return false;
	if (of_ipv6 && !half[0] && !half[1])
		return takes_any(ctx, ipv6, port);
	if (!is_node_port(ctx->protocol, port, of_ipv6))
		return false;
	if (!of_ipv6 && !ipv4_of(addr))
		return true;
	__builtin_memcpy(key.daddr, addr, 16);
	set_ports(&key, 0, ctx->user_port, ctx->protocol);
	return has_service(&key, services_mask);
}

/* For the log: who it was, and which port. */
static __always_inline void tell_refused(struct bpf_sock_addr *ctx, const __u8 *addr)
{
	struct bind_refused *told = bpf_ringbuf_reserve(&sock_refused, sizeof(*told), 0);

	if (!told)
		return;
	__builtin_memset(told, 0, sizeof(*told));
	if (!is_mapped(addr) || ipv4_of(addr))
		__builtin_memcpy(told->addr, addr, 16);
	told->cgroup = bpf_get_current_cgroup_id();
	told->port = ctx->user_port;
	told->proto = ctx->protocol;
	told->pid = bpf_get_current_pid_tgid() >> 32;
	bpf_get_current_comm(told->comm, sizeof(told->comm));
	bpf_ringbuf_submit(told, BPF_RB_NO_WAKEUP);
}

#endif
