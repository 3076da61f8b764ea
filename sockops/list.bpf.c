/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Every socket of the host that has something in a VIP's place, told from the kernel's own list of what
 * is kept with sockets: exact, whatever the namespace, and nothing has to be counted when one closes.
 * And the ends of streams, which pass TCP by or might have.
 */
#include <linux/bpf.h>
#include <linux/in.h>
#include <bpf/bpf_helpers.h>

#include "abi_sockets.h"
#include "abi_streams.h"
#include "kernel_sock.h"
#include "packet.h"

#define PF_INET 2

/* Python reads it from the BTF: a row has no map. */
struct {
	struct sock_row row;
	enum sock_family family;
	struct stream_row end;
	enum stream_event event;
	enum stream_side side;
} list_types SEC(".data.layout");

static __always_inline void describe(struct sock_row *row, struct sock *sk)
{
	struct socket *socket = sk->sk_socket;
	struct cgroup *group = sk->sk_cgrp_data.cgroup;
	struct file *file = socket ? socket->file : NULL;
	struct inode *inode = file ? file->f_inode : NULL;
	struct kernfs_node *node = group ? group->kn : NULL;
	struct net *net = sk->__sk_common.skc_net.net;

	row->netns = net->net_cookie;
	row->netns_inum = net->ns.inum;
	row->cgroup = node ? node->id : 0;
	row->inode = inode ? inode->i_ino : 0;
	row->uid = sk->sk_uid.val;
	row->cookie = sk->__sk_common.skc_cookie.counter;
	row->own_port = sk->__sk_common.skc_num;
	row->proto = sk->sk_protocol;
	row->state = sk->__sk_common.skc_state;
	row->ipv6 = sk->__sk_common.skc_family != PF_INET;
	if (row->ipv6)
		*(struct in6_words *)row->own = sk->__sk_common.skc_v6_rcv_saddr;
	else
		map_ipv4(row->own, sk->__sk_common.skc_rcv_saddr);
}

static __always_inline void tell(struct seq_file *seq, struct sock_row *row,
				 const struct sock_flow *flow)
{
	__builtin_memcpy(row->vip, flow->vip, 16);
	__builtin_memcpy(row->addr, flow->addr, 16);
	row->vip_port = flow->vip_port;
	row->port = flow->port;
	row->backend = flow->backend;
	row->seen_ns = flow->seen_ns;
	bpf_seq_write(seq, row, sizeof(*row));
}

/* Of map sock_peers. */
SEC("iter/bpf_sk_storage_map")
int shunt_peers(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	struct sock_flow *flow = ctx->value;
	struct sock_row row = {.connected = 1};
	struct sock *sk = ctx->sk;

	if (!sk || !flow)
		return 0;
	describe(&row, sk);
	tell(ctx->meta->seq, &row, flow);
	return 0;
}

/* Of map sock_flows. */
SEC("iter/bpf_sk_storage_map")
int shunt_flows(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	struct sock_flows_val *flows = ctx->value;
	struct sock_row row = {};
	struct sock *sk = ctx->sk;

	if (!sk || !flows)
		return 0;
	describe(&row, sk);
	for (int i = 0; i < SOCK_FLOWS; i++)
		if (flows->flow[i].seen_ns)
			tell(ctx->meta->seq, &row, &flows->flow[i]);
	return 0;
}

/* Of map sock_streams: clients' ends, and servers'. */
SEC("iter/bpf_sk_storage_map")
int shunt_ends(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	struct stream_val *stream = ctx->value;
	struct stream_row end = {};
	struct sock *sk = ctx->sk;

	if (!sk || !stream)
		return 0;
	describe(&end.socket, sk);
	end.stream = *stream;
	bpf_seq_write(ctx->meta->seq, &end, sizeof(end));
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
