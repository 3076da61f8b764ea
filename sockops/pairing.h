/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * How the two ends of a connection come into the map of sockets: the client dials, its SYN comes to
 * a listener of this node, it has the answer (its end goes in), and so has the server (its end goes
 * in). Whatever goes another way, as fast open does, stays on TCP. And how they get out again.
 */
#ifndef SHUNT_PAIRING_H
#define SHUNT_PAIRING_H

#include "payer.h"

/* When the state changes, and when a packet is sent: of a connection that is redirected there are
 * next to none. */
#define CALL_BACK (BPF_SOCK_OPS_STATE_CB_FLAG | BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG)

/* Before the client's SYN is made. */
static __always_inline void on_dial(struct bpf_sock_ops *ctx, struct bpf_sock *sk,
				    struct tcp_sock *tp)
{
	struct stream_dial_val dial = {.pair = bpf_get_socket_cookie(ctx)};
	struct stream_dial_key key = {};
	__u32 svc, payer = this_payer();
	struct stream_val *stream;

	/* Of a connection before, if it was one. */
	bpf_sk_storage_delete(&sock_streams, sk);
	svc = service_of(sk);
	if (!svc || !may_redirect(svc))
		return;
	if (!may_pair(payer)) {
		count_event(STREAM_LEFT_BRIEF, 0);
		return;
	}
	stream = bpf_sk_storage_get(&sock_streams, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	dial_key(&key, ctx, true);
	if (!stream || bpf_map_update_elem(&stream_dials, &key, &dial, BPF_ANY)) {
		count_event(STREAM_LEFT_FULL, 0);
		return;
	}
	stream->pair = dial.pair;
	stream->svc = svc;
	stream->payer = payer;
	stream->side = STREAM_CLIENT;
	stream->first_out = tp->write_seq + 1;
}

/* A SYN has come to a listener of this node. */
static __always_inline void on_syn(struct bpf_sock_ops *ctx)
{
	struct stream_dial_key key = {};
	struct stream_dial_val *dial;

	dial_key(&key, ctx, false);
	dial = bpf_map_lookup_elem(&stream_dials, &key);
	if (dial)
		dial->heard = 1;
}

static __always_inline __u32 enter(struct bpf_sock_ops *ctx, const struct stream_val *stream)
{
	struct stream_end_key end = {.pair = stream->pair, .side = stream->side};

	if (bpf_sock_hash_update(ctx, &sock_ends, &end, BPF_NOEXIST))
		return STREAM_LEFT_FULL;
	/* Others may want to be called for the socket too. */
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | CALL_BACK);
	return STREAM_NONE;
}

static __always_inline __u32 enter_client(struct bpf_sock_ops *ctx, struct stream_val *stream,
					  const struct tcp_sock *tp)
{
	struct stream_pair pair = {.svc = stream->svc, .payer = stream->payer};
	struct stream_dial_key key = {};
	struct stream_dial_val *dial;

	dial_key(&key, ctx, true);
	dial = bpf_map_lookup_elem(&stream_dials, &key);
	if (!dial || dial->pair != stream->pair)
		return STREAM_LEFT_MISMATCH;
	if (!dial->heard) {
		bpf_map_delete_elem(&stream_dials, &key);
		return STREAM_LEFT_REMOTE;
	}
	if (has_option(tp))
		return STREAM_LEFT_OPTION;
	stream->first_in = tp->rcv_nxt;
	pair.client_isn = stream->first_out - 1;
	pair.server_isn = stream->first_in - 1;
	if (bpf_map_update_elem(&stream_pairs, &stream->pair, &pair, BPF_ANY))
		return STREAM_LEFT_FULL;
	return enter(ctx, stream);
}

/* The client's end has its SYN-ACK; the server's has nothing yet. */
static __always_inline void on_active(struct bpf_sock_ops *ctx, struct bpf_sock *sk,
				      struct tcp_sock *tp)
{
	struct stream_val *stream = bpf_sk_storage_get(&sock_streams, sk, 0, 0);

	if (!stream)
		return;
	stream->why = enter_client(ctx, stream, tp);
	if (stream->why) {
		bpf_map_delete_elem(&stream_pairs, &stream->pair);
		count_event(stream->why, 0);
	}
}

static __always_inline __u32 enter_server(struct bpf_sock_ops *ctx, struct bpf_sock *sk,
					  const struct tcp_sock *tp, __u64 id,
					  struct stream_pair *pair)
{
	struct stream_val *stream;
	__u32 why;

	if (pair->client_isn + 1 != tp->rcv_nxt || pair->server_isn + 1 != tp->write_seq)
		return STREAM_LEFT_MISMATCH;
	if (has_option(tp))
		return STREAM_LEFT_OPTION;
	stream = bpf_sk_storage_get(&sock_streams, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!stream)
		return STREAM_LEFT_FULL;
	stream->pair = id;
	stream->svc = pair->svc;
	stream->payer = pair->payer;
	stream->side = STREAM_SERVER;
	stream->first_out = tp->write_seq;
	stream->first_in = tp->rcv_nxt;
	why = enter(ctx, stream);
	if (why)
		bpf_sk_storage_delete(&sock_streams, sk);
	return why;
}

/* The server's end has the last part of the handshake, and perhaps data with it. */
static __always_inline void on_passive(struct bpf_sock_ops *ctx, struct bpf_sock *sk,
				       struct tcp_sock *tp)
{
	struct stream_dial_key key = {};
	struct stream_dial_val *dial;
	struct stream_pair *pair;
	__u64 id;
	__u32 why;

	dial_key(&key, ctx, false);
	dial = bpf_map_lookup_elem(&stream_dials, &key);
	if (!dial)
		return;
	id = dial->pair;
	pair = bpf_map_lookup_elem(&stream_pairs, &id);
	/* Without one the client's end is not in the map; with fast open it is not open yet. */
	if (!pair)
		return;
	why = enter_server(ctx, sk, tp, id, pair);
	if (why) {
		/* Of another connection, if it is a mismatch: that one is let be. */
		if (why != STREAM_LEFT_MISMATCH) {
			pair->why = why;
			WRITE_ONCE(pair->quiet[STREAM_SERVER], 1);
		}
		count_event(why, 0);
		return;
	}
	bpf_map_delete_elem(&stream_dials, &key);
	__sync_fetch_and_add(&pair->ready, 1); /* ordered after the entries */
	count_event(STREAM_PAIRED, 0);
}

static __always_inline void on_state(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	struct stream_val *stream;

	if (ctx->args[1] != BPF_TCP_CLOSE)
		return;
	stream = bpf_sk_storage_get(&sock_streams, sk, 0, 0);
	if (!stream || !find_pair(stream))
		return;
	bpf_map_delete_elem(&stream_pairs, &stream->pair);
	charge(stream);
}

/*
 * A packet: TCP is in use. In the map TCP costs half as much again for a stream in one direction, and
 * some of what sockets can do is not to be had; so an end of a connection that is TCP's for ever
 * leaves it, once nothing lies in its queue and no message is under way to it.
 */
static __always_inline void on_packet(struct bpf_sock_ops *ctx, struct bpf_sock *sk,
				      const struct tcp_sock *tp)
{
	struct stream_val *stream = bpf_sk_storage_get(&sock_streams, sk, 0, 0);
	struct stream_end_key end = {};
	struct stream_pair *pair;

	if (!stream)
		return;
	pair = find_pair(stream);
	if (!pair || !READ_ONCE(pair->why))
		return;
	if (is_quiet(tp))
		WRITE_ONCE(pair->quiet[stream->side & 1], 1);
	if (!stream->gone && READ_ONCE(pair->quiet[~stream->side & 1]) && has_read_all(tp)) {
		end.pair = stream->pair;
		end.side = stream->side;
		bpf_map_delete_elem(&sock_ends, &end);
		stream->gone = 1;
		stream->why = pair->why;
		count_event(STREAM_GONE, 0);
	}
	if (stream->gone && pair->quiet[stream->side & 1])
		bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags &
						       ~BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG);
}

#endif
