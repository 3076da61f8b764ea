/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Which connections are redirected, and the maps in which their two ends find each other. */
#ifndef SHUNT_DIAL_H
#define SHUNT_DIAL_H

#include "abi_sockets.h"
#include "abi_streams.h"
#include "array_map.h"
#include "count.h"
#include "kernel_stream.h"
#include "memory.h"
#include "packet.h"
#include "storage.h"

const volatile struct stream_config config = {};

ARRAY_MAP(backends, struct backend_val, 1024, BPF_F_MMAPABLE);
PERCPU_MAP(stream_events, struct stream_count, STREAM_EVENTS);

SOCKET_STORAGE(sock_peers, struct sock_flow); /* kept.h: what connect() gave a socket */
SOCKET_STORAGE(sock_streams, struct stream_val);

/* LRU: what is forgotten leaves a connection to TCP, no more. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, struct stream_dial_key);
	__type(value, struct stream_dial_val);
} stream_dials SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 32768);
	__type(key, __u64);
	__type(value, struct stream_pair);
} stream_pairs SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 65536);
	__type(key, struct stream_end_key);
	__type(value, __u64);
} sock_ends SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct stream_optin);
} stream_optins SEC(".maps");

/* LRU: who is forgotten begins anew. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, struct stream_payer);
} stream_payers SEC(".maps");

/* The connection's record. A socket may be connected again, and the record is by its cookie: what is
 * left of the connection before must not find the new one's. */
static __always_inline struct stream_pair *find_pair(const struct stream_val *stream)
{
	struct stream_pair *pair = bpf_map_lookup_elem(&stream_pairs, &stream->pair);
	bool client = stream->side == STREAM_CLIENT;

	if (!pair || (client ? pair->client_isn : pair->server_isn) + 1 != stream->first_out ||
	    (client ? pair->server_isn : pair->client_isn) + 1 != stream->first_in)
		return NULL;
	return pair;
}

static __always_inline void count_event(__u32 event, __u32 bytes)
{
	struct stream_count *n = bpf_map_lookup_elem(&stream_events, &event);

	if (!n)
		return;
	__sync_fetch_and_add(&n->times, 1); /* these programs are preempted */
	__sync_fetch_and_add(&n->bytes, bytes);
}

/* Whether connections of the service may pass TCP by: asked when one is opened, and again at every
 * message. Whatever else has to see a connection's packets is to be asked here. */
static __always_inline bool may_redirect(__u32 svc)
{
	struct stream_optin *optin = bpf_map_lookup_elem(&stream_optins, &svc);

	return optin && READ_ONCE(optin->redirect);
}

/* The service by whose VIP the socket is being connected; 0 if by none. */
static __always_inline __u32 service_of(struct bpf_sock *sk)
{
	struct sock_flow *flow = bpf_sk_storage_get(&sock_peers, sk, 0, 0);
	struct backend_val *b;
	__u32 id;

	if (!flow || !flow->seen_ns)
		return 0;
	id = flow->backend;
	b = bpf_map_lookup_elem(&backends, &id);
	return b ? b->svc : 0;
}

static __always_inline bool is_everywhere(const __u8 *addr)
{
	const __u64 *half = (const __u64 *)addr;

	return is_mapped(addr) ? addr[12] == 127 : !half[0] && half[1] == 1ULL << 56; /* ::1 */
}

static __always_inline void dial_key(struct stream_dial_key *key, struct bpf_sock_ops *ctx,
				     bool client)
{
	__u8 *local = client ? key->client : key->server;
	__u8 *remote = client ? key->server : key->client;
	__u16 ours = ctx->local_port, theirs = bpf_ntohl(ctx->remote_port);

	if (ctx->family == AF_INET6) {
		__u32 *to = (__u32 *)local;

		to[0] = ctx->local_ip6[0];
		to[1] = ctx->local_ip6[1];
		to[2] = ctx->local_ip6[2];
		to[3] = ctx->local_ip6[3];
		to = (__u32 *)remote;
		to[0] = ctx->remote_ip6[0];
		to[1] = ctx->remote_ip6[1];
		to[2] = ctx->remote_ip6[2];
		to[3] = ctx->remote_ip6[3];
	} else {
		map_ipv4(local, ctx->local_ip4);
		map_ipv4(remote, ctx->remote_ip4);
	}
	key->client_port = client ? ours : theirs;
	key->server_port = client ? theirs : ours;
	if (is_everywhere(key->server) || is_everywhere(key->client))
		key->netns = bpf_get_netns_cookie(ctx);
}

#endif
