/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Redirected streams without guards, in the form that is found everywhere: every connection's ends
 * go into the map by addresses and ports, and what they send goes to the other one if it is there.
 * What goes wrong with it is what sockops/stream.bpf.c guards against. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>

struct ends_key {
	__u32 local, remote; /* IPv4, as it is in the packet */
	__u32 local_port, remote_port;
};

struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 65536);
	__type(key, struct ends_key);
	__type(value, __u64);
} plain_ends SEC(".maps");

SEC("sockops")
int plain_streams(struct bpf_sock_ops *ctx)
{
	struct ends_key key = {
		.local = ctx->local_ip4,
		.remote = ctx->remote_ip4,
		.local_port = ctx->local_port,
		.remote_port = bpf_ntohl(ctx->remote_port),
	};

	if (ctx->op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB ||
	    ctx->op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
		bpf_sock_hash_update(ctx, &plain_ends, &key, BPF_ANY);
	return 1;
}

SEC("sk_msg")
int plain_stream(struct sk_msg_md *ctx)
{
	struct ends_key key = {
		.local = ctx->remote_ip4,
		.remote = ctx->local_ip4,
		.local_port = bpf_ntohl(ctx->remote_port),
		.remote_port = ctx->local_port,
	};

	bpf_msg_redirect_hash(ctx, &plain_ends, &key, BPF_F_INGRESS);
	return SK_PASS;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
