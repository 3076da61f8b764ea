/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Translation at the socket: whoever on this node connects or sends to a VIP gets a backend in its
 * place before there is a packet, so that neither the VIP's being an address of the node nor its
 * route matters. getpeername() and recvmsg() show the VIP again.
 *
 * The kernel holds the socket's lock around each of these programs: what is kept with a socket is
 * read and written by one at a time.
 */
#include <linux/errno.h>

#include "address.h"
#include "bind.h"
#include "client.h"
#include "count.h"
#include "excluded.h"
#include "family.h"
#include "kept.h"
#include "refused.h"

const volatile struct sock_config config = {};

PERCPU_MAP(sock_reasons, struct event_count, SOCK_REASONS);

/* Python reads it from the BTF. */
struct {
	enum sock_reason reason;
	enum sock_family family;
	struct bind_refused refused; /* a ring has no value type */
} sock_types SEC(".data.layout");

enum { REFUSE, ALLOW };

/* The one exit of calls that may be translated. */
static __always_inline int leave(__u32 reason)
{
	struct event_count *n = bpf_map_lookup_elem(&sock_reasons, &reason);

	if (n)
		__sync_fetch_and_add(&n->times, 1); /* these programs are preempted */
	switch (reason) {
	case SOCK_REFUSED_NO_BACKEND:
		bpf_set_retval(-ECONNREFUSED);
		return REFUSE;
	case SOCK_REFUSED_NO_MEMORY:
		bpf_set_retval(-ENOBUFS);
		return REFUSE;
	case SOCK_REFUSED_NODE_PORT:
		bpf_set_retval(-EADDRINUSE);
		return REFUSE;
	case SOCK_REFUSED_SOURCE:
		return REFUSE; /* EPERM, as from a packet filter */
	default:
		return ALLOW;
	}
}

/* Whether calls of the socket are looked at; if not, `reason` says why. */
static __always_inline bool is_covered(struct bpf_sock_addr *ctx, struct bpf_sock *sk,
				       struct sock_ask *ask, __u32 *reason)
{
	*reason = SOCK_PASS_NAMESPACE;
	ask->netns = bpf_get_netns_cookie(ctx);
	if (!sk || (!config.all && ask->netns != config.netns))
		return false;
	*reason = SOCK_PASS_CHECK;
	return (sk->mark & ~SLOT_BACKEND_MASK) != config.check_mark;
}

/* choose(), unless the process is one that sees VIPs. Not static: verified once, and not again for
 * each way that leads here. */
__noinline __u32 decide(const struct sock_ask *ask, struct sock_answer *answer)
{
	struct svc_val *service;

	if (!ask || !answer)
		return SOCK_PASS_BAD_TABLE;
	service = find_service(ask, answer, config.services_mask);
	if (service && config.excludes && in_excluded_group())
		answer->reason = SOCK_PASS_CGROUP;
	else if (service)
		choose_of(answer, ask, service);
	return answer->reason;
}

/* connect() ---------------------------------------------------------------------------------- */

static __always_inline int on_connect(struct bpf_sock_addr *ctx, bool ipv6)
{
	struct sock_ask ask = {
		.proto = ctx->protocol,
		.port = ctx->user_port,
	};
	struct sock_answer answer = {};
	struct bpf_sock *sk = ctx->sk;
	struct sock_flow *peer;
	__u32 reason;

	if (!is_covered(ctx, sk, &ask, &reason))
		return leave(reason);
	read_address(ctx, ipv6, ask.vip);
	ask.families = families_of(sk, ask.proto, ipv6);
	ask.now_ns = bpf_ktime_get_ns();
	ask.entropy = bpf_get_prandom_u32();
	/* Of a connection before, if it was one. */
	bpf_sk_storage_delete(&sock_peers, sk);
	reason = decide(&ask, &answer);
	if (reason == SOCK_TO_BACKEND_CONNECT && answer.sources) {
		__u8 own[16] __attribute__((aligned(8)));

		read_own(sk, ipv6, own);
		reason = check_source(&ask, &answer, own, config.netns);
	}
	if (reason != SOCK_TO_BACKEND_CONNECT)
		return leave(reason);
	peer = new_peer(sk, config.mptcp);
	if (!peer)
		return leave(SOCK_REFUSED_NO_MEMORY);
	*peer = flow_of(&ask, &answer);
	write_address(ctx, ipv6, answer.addr, answer.port);
	return leave(reason);
}

SEC("cgroup/connect4")
int shunt_connect4(struct bpf_sock_addr *ctx)
{
	return on_connect(ctx, false);
}

SEC("cgroup/connect6")
int shunt_connect6(struct bpf_sock_addr *ctx)
{
	return on_connect(ctx, true);
}

/* sendmsg() with an address ------------------------------------------------------------------ */

static __always_inline int on_sendmsg(struct bpf_sock_addr *ctx, bool ipv6)
{
	struct sock_ask ask = {
		.proto = ctx->protocol, /* UDP, or UDP-Lite */
		.port = ctx->user_port,
		.families = ipv6 ? SOCK_IPV6 : SOCK_IPV4,
	};
	struct sock_answer answer = {};
	struct sock_flows_val *flows;
	struct bpf_sock *sk = ctx->sk;
	struct sock_flow *flow;
	__u32 reason;

	if (!is_covered(ctx, sk, &ask, &reason))
		return leave(reason);
	read_address(ctx, ipv6, ask.vip);
	ask.now_ns = bpf_ktime_get_ns();
	ask.entropy = stir(bpf_get_socket_cookie(ctx) ^ ask.now_ns) >> 32;
	flows = bpf_sk_storage_get(&sock_flows, sk, 0, 0);
	recall_peer(sk, &ask);
	if (!ask.kept.seen_ns && flows) {
		flow = sent_to(flows, &ask);
		if (is_to_vip(flow, &ask))
			ask.kept = *flow;
	}
	reason = decide(&ask, &answer);
	if (reason == SOCK_TO_BACKEND_CONNECT && answer.sources) {
		__u8 own[16] __attribute__((aligned(8)));

		read_source(ctx, ipv6, own);
		reason = check_source(&ask, &answer, own, config.netns);
	}
	if (reason != SOCK_TO_BACKEND_CONNECT) {
		if (flows)
			forget_sent(flows, &ask);
		return leave(reason);
	}
	if (!flows)
		flows = bpf_sk_storage_get(&sock_flows, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!flows)
		return leave(SOCK_REFUSED_NO_MEMORY);
	*sent_to(flows, &ask) = flow_of(&ask, &answer);
	write_address(ctx, ipv6, answer.addr, answer.port);
	return leave(SOCK_TO_BACKEND_SEND);
}

SEC("cgroup/sendmsg4")
int shunt_sendmsg4(struct bpf_sock_addr *ctx)
{
	return on_sendmsg(ctx, false);
}

SEC("cgroup/sendmsg6")
int shunt_sendmsg6(struct bpf_sock_addr *ctx)
{
	return on_sendmsg(ctx, true);
}

/* recvmsg() and getpeername(): the VIP again -------------------------------------------------- */

/* IPv4 has no way to show a VIP of IPv6, and is never given one. */
static __always_inline int show_vip(struct bpf_sock_addr *ctx, bool ipv6, bool datagram)
{
	struct sock_flow *peer, *found = NULL;
	__u8 addr[16] __attribute__((aligned(8)));
	struct bpf_sock *sk = ctx->sk;
	struct sock_flows_val *flows;
	__be16 port = ctx->user_port;

	if (!sk)
		return ALLOW;
	read_address(ctx, ipv6, addr);
	peer = bpf_sk_storage_get(&sock_peers, sk, 0, 0);
	if (peer && is_from(peer, addr, port)) {
		found = peer;
	} else if (datagram) {
		flows = bpf_sk_storage_get(&sock_flows, sk, 0, 0);
		if (!flows)
			return ALLOW;
		/* Of several VIPs with this backend, the one that was asked last. */
		for (int i = 0; i < SOCK_FLOWS; i++) {
			struct sock_flow *flow = &flows->flow[i];

			if (is_from(flow, addr, port) && (!found || flow->seen_ns > found->seen_ns))
				found = flow;
		}
	}
	if (found)
		write_address(ctx, ipv6, found->vip, found->vip_port);
	return ALLOW;
}

SEC("cgroup/recvmsg4")
int shunt_recvmsg4(struct bpf_sock_addr *ctx)
{
	return show_vip(ctx, false, true);
}

SEC("cgroup/recvmsg6")
int shunt_recvmsg6(struct bpf_sock_addr *ctx)
{
	return show_vip(ctx, true, true);
}

SEC("cgroup/getpeername4")
int shunt_peername4(struct bpf_sock_addr *ctx)
{
	return show_vip(ctx, false, false);
}

SEC("cgroup/getpeername6")
int shunt_peername6(struct bpf_sock_addr *ctx)
{
	return show_vip(ctx, true, false);
}

/* bind() ------------------------------------------------------------------------------------- */

static __always_inline int on_bind(struct bpf_sock_addr *ctx, bool ipv6)
{
	struct bind_ask ask = {
		.netns = bpf_get_netns_cookie(ctx),
		.port = ctx->user_port,
		.proto = ctx->protocol,
		.ipv6_only = ipv6 && is_ipv6_only(ctx->sk, ctx->protocol),
	};
	__u32 reason;

	read_address(ctx, ipv6, ask.addr);
	reason = try_bind(&ask, config.netns, config.services_mask);
	if (reason == SOCK_REFUSED_NODE_PORT)
		tell_refused(&ask);
	return leave(reason);
}

SEC("cgroup/bind4")
int shunt_bind4(struct bpf_sock_addr *ctx)
{
	return on_bind(ctx, false);
}

SEC("cgroup/bind6")
int shunt_bind6(struct bpf_sock_addr *ctx)
{
	return on_bind(ctx, true);
}

/* The decision alone, of a socket that need not be there: by BPF_PROG_TEST_RUN. */
SEC("syscall")
int shunt_sock_try(struct sock_try *ctx)
{
	struct sock_answer answer = {};
	struct sock_ask ask = ctx->ask;

	choose(&ask, &answer, config.services_mask);
	ctx->answer = answer;
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
