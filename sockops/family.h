/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Which families of addresses a socket can have to do with. */
#ifndef SHUNT_FAMILY_H
#define SHUNT_FAMILY_H

#include <bpf/bpf_core_read.h>

#include "abi_sockets.h"
#include "address.h"
#include "kernel_sock.h"

/* Whether a socket of IPv6 is for IPv6 alone. bpf_getsockopt() has no IPV6_V6ONLY. */
static __always_inline bool is_ipv6_only(struct bpf_sock *own, __u8 proto)
{
	struct sock *sk = NULL;

	if (own)
		sk = proto == IPPROTO_TCP ? (void *)bpf_skc_to_tcp_sock(own) :
					    (void *)bpf_skc_to_udp6_sock(own);
	return sk && BPF_CORE_READ_BITFIELD(&sk->__sk_common, skc_ipv6only);
}

/* enum sock_family: what a connect() can address. A socket of IPv6 that is bound has one family alone. */
static __always_inline __u8 families_of(struct bpf_sock *sk, __u8 proto, bool ipv6)
{
	__u8 own[16] __attribute__((aligned(8)));
	__u64 *half = (__u64 *)own;

	if (!ipv6)
		return SOCK_IPV4;
	read_ipv6(own, sk->src_ip6);
	if (is_mapped(own))
		return SOCK_IPV4;
	if (half[0] || half[1] || is_ipv6_only(sk, proto))
		return SOCK_IPV6;
	return SOCK_IPV4 | SOCK_IPV6;
}

#endif
