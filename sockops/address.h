/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The address of a socket's call, as the kernel shows it to programs and lets them replace it. */
#ifndef SHUNT_ADDRESS_H
#define SHUNT_ADDRESS_H

#include <stdbool.h>

#include "packet.h"

/* The context's fields are read and written in words of four bytes at fixed offsets. */
static __always_inline void read_ipv6(__u8 *to, const __u32 *from)
{
	__u32 *word = (__u32 *)to;

	word[0] = from[0];
	word[1] = from[1];
	word[2] = from[2];
	word[3] = from[3];
}

static __always_inline void write_address(struct bpf_sock_addr *ctx, bool ipv6, const __u8 *addr,
					  __be16 port)
{
	const __u32 *word = (const __u32 *)addr;

	if (ipv6) {
		ctx->user_ip6[0] = word[0];
		ctx->user_ip6[1] = word[1];
		ctx->user_ip6[2] = word[2];
		ctx->user_ip6[3] = word[3];
	} else {
		ctx->user_ip4 = word[3];
	}
	ctx->user_port = port;
}

static __always_inline void read_address(struct bpf_sock_addr *ctx, bool ipv6, __u8 *addr)
{
	if (ipv6)
		read_ipv6(addr, ctx->user_ip6);
	else
		map_ipv4(addr, ctx->user_ip4);
}

/* What the socket is bound to; zero: nothing yet. */
static __always_inline void read_own(const struct bpf_sock *sk, bool ipv6, __u8 *addr)
{
	if (ipv6)
		read_ipv6(addr, sk->src_ip6);
	else
		map_ipv4(addr, sk->src_ip4);
}

/* What a datagram is sent from. */
static __always_inline void read_source(struct bpf_sock_addr *ctx, bool ipv6, __u8 *addr)
{
	if (ipv6)
		read_ipv6(addr, ctx->msg_src_ip6);
	else
		map_ipv4(addr, ctx->msg_src_ip4);
}

#endif
