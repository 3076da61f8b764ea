/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Stale sockets: connected, to a backend that was put in a VIP's place and has gone since. Iterators
 * find them and close them.
 *
 * What counts is what the socket keeps (map sock_peers) and where it is connected to now, never an
 * address alone; and what the tables say at the moment of closing. So nothing has to be told of
 * which backends went: not when, not by which daemon.
 */
#include <linux/in6.h>

#include "address.h"
#include "kept.h"
#include "kernel_types.h"

typedef struct {
	__s64 counter;
} atomic64_t;

struct sock_common {
	__be32 skc_daddr;
	__be32 skc_rcv_saddr;
	__be16 skc_dport;
	__u16 skc_num;
	unsigned short skc_family;
	volatile unsigned char skc_state;
	int skc_bound_dev_if;
	possible_net_t skc_net;
	struct in6_addr skc_v6_daddr;
	struct in6_addr skc_v6_rcv_saddr;
	atomic64_t skc_cookie;
} KERNEL_TYPE;

struct sock {
	struct sock_common __sk_common;
	__u16 sk_protocol;
} KERNEL_TYPE;

struct bpf_iter_meta {
	struct seq_file *seq;
} KERNEL_TYPE;

struct bpf_iter__bpf_sk_storage_map {
	struct bpf_iter_meta *meta;
	struct sock *sk;
	void *value;
} KERNEL_TYPE;

struct bpf_iter__udp {
	struct bpf_iter_meta *meta;
	struct udp_sock *udp_sk;
} KERNEL_TYPE;

struct bpf_iter__tcp {
	struct bpf_iter_meta *meta;
	struct sock_common *sk_common;
} KERNEL_TYPE;

/* Linux 6.5. Before, the socket is closed by its cookie. */
extern int bpf_sock_destroy(struct sock_common *sk) __ksym __weak;

/* net/tcp_states.h */
enum { STATE_TIME_WAIT = 6, STATE_CLOSE = 7, STATE_LISTEN = 10 };

const volatile struct stale_config config = {};

/* Python reads it from the BTF. */
struct {
	struct stale_socket socket;
} stale_types SEC(".data.layout");

/* It may have gone to an id that is another backend's by now. A drained one keeps what it has. */
static __always_inline bool is_live(const struct sock_flow *flow, __u8 proto)
{
	__u32 id = flow->backend;
	struct backend_val *b = bpf_map_lookup_elem(&backends, &id);
	struct svc_val *s;
	__u32 index;

	if (!id || !b ||
	    (READ_ONCE(b->flags) & (BACKEND_KNOWN | BACKEND_UP | BACKEND_REMOVED)) !=
		    (BACKEND_KNOWN | BACKEND_UP))
		return false;
	index = b->svc;
	s = bpf_map_lookup_elem(&svc, &index);
	return s && s->proto == proto && same_address(b->addr, flow->addr) &&
	       (b->port ?: flow->vip_port) == flow->port;
}

/* Fills `found`, which is zero. */
static __always_inline bool is_stale(const struct sock_common *sk, const struct sock_flow *flow,
				     __u8 proto, struct stale_socket *found)
{
	__u8 state = sk->skc_state;

	if (state == STATE_CLOSE || state == STATE_LISTEN || state == STATE_TIME_WAIT)
		return false;
	if (sk->skc_family == AF_INET6) {
		read_ipv6(found->daddr, (const __u32 *)&sk->skc_v6_daddr);
		read_ipv6(found->saddr, (const __u32 *)&sk->skc_v6_rcv_saddr);
	} else {
		map_ipv4(found->daddr, sk->skc_daddr);
		map_ipv4(found->saddr, sk->skc_rcv_saddr);
	}
	found->dport = sk->skc_dport;
	/* Connected elsewhere since, which the programs of connect() are not always asked about. */
	if (!same_address(found->daddr, flow->addr) || found->dport != flow->port)
		return false;
	if (is_live(flow, proto))
		return false;
	found->sport = bpf_htons(sk->skc_num);
	found->netns = sk->skc_net.net->ns.inum;
	found->ifindex = sk->skc_bound_dev_if;
	found->family = sk->skc_family;
	found->proto = proto;
	found->cookie = sk->skc_cookie.counter;
	return true;
}

/* Of all network namespaces. No socket is locked or held, so none is touched. */
SEC("iter/bpf_sk_storage_map")
int shunt_stale_find(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	struct stale_socket found = {};
	struct sock_flow *flow = ctx->value;
	struct sock *sk = ctx->sk;
	__u16 proto;

	if (!sk || !flow)
		return 0;
	proto = sk->sk_protocol;
	if (proto != IPPROTO_UDP && (proto != IPPROTO_TCP || !config.tcp))
		return 0;
	if (is_stale(&sk->__sk_common, flow, proto, &found))
		bpf_seq_write(ctx->meta->seq, &found, sizeof(found));
	return 0;
}

/* Of one network namespace. The kernel holds the socket, and calls again for one that there was no
 * room to tell of: that is told first. */
static __always_inline bool tell(struct seq_file *seq, void *sk, __u8 proto)
{
	struct stale_socket found = {};
	struct sock_flow *flow = bpf_sk_storage_get(&sock_peers, sk, 0, 0);

	if (!flow || !is_stale(sk, flow, proto, &found))
		return false;
	found.cookie = bpf_get_socket_cookie(sk);
	return bpf_seq_write(seq, &found, sizeof(found)) == 0;
}

SEC("iter/udp")
int shunt_stale_udp(struct bpf_iter__udp *ctx)
{
	struct udp_sock *sk = ctx->udp_sk;

	if (sk && tell(ctx->meta->seq, sk, IPPROTO_UDP))
		bpf_sock_destroy((struct sock_common *)sk);
	return 0;
}

SEC("iter/udp")
int shunt_tell_udp(struct bpf_iter__udp *ctx)
{
	struct udp_sock *sk = ctx->udp_sk;

	if (sk)
		tell(ctx->meta->seq, sk, IPPROTO_UDP);
	return 0;
}

SEC("iter/tcp")
int shunt_stale_tcp(struct bpf_iter__tcp *ctx)
{
	struct sock_common *common = ctx->sk_common;
	struct tcp_sock *sk;

	if (!common)
		return 0;
	sk = bpf_skc_to_tcp_sock(common);
	if (sk && tell(ctx->meta->seq, sk, IPPROTO_TCP))
		bpf_sock_destroy(common);
	return 0;
}

SEC("iter/tcp")
int shunt_tell_tcp(struct bpf_iter__tcp *ctx)
{
	struct sock_common *common = ctx->sk_common;
	struct tcp_sock *sk;

	if (!common)
		return 0;
	sk = bpf_skc_to_tcp_sock(common);
	if (sk)
		tell(ctx->meta->seq, sk, IPPROTO_TCP);
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
