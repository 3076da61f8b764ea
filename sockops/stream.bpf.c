/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Redirected streams: what one end of a TCP connection sends goes straight to the other end's
 * socket, if both are on this node. Only of services that ask for it, and guarded: the kernel's
 * means for this keep neither TCP's order nor its bounds by themselves.
 *
 *  - Order: an end's bytes are redirected while none has gone by TCP in either direction, then never
 *    again. The socket's own sequence numbers tell it. A reader gets redirected bytes first.
 *  - Memory: what lies unread is bounded. Whoever sends shows whether it has read all that it was
 *    sent; what goes beyond the bound goes by TCP, from then on.
 *  - Nobody else's: both ends know both initial sequence numbers, and the map's key is the client's
 *    socket, not addresses and ports.
 *  - An entry is never replaced, nor deleted while anything may lie in its queue or come into it.
 */
#include <linux/errno.h>

#include "pairing.h"

/* Python reads it from the BTF. */
struct {
	enum stream_event event;
	enum stream_side side;
} stream_types SEC(".data.layout");

SEC("sockops")
int shunt_streams(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct tcp_sock *tp;
	__u32 op = ctx->op;

	if (!ctx->is_fullsock) {
		if (op == BPF_SOCK_OPS_RWND_INIT)
			on_syn(ctx);
		return 1;
	}
	if (!sk)
		return 1;
	if (op == BPF_SOCK_OPS_STATE_CB) {
		on_state(ctx, sk);
		return 1;
	}
	if (op != BPF_SOCK_OPS_HDR_OPT_LEN_CB && op != BPF_SOCK_OPS_TCP_CONNECT_CB &&
	    op != BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB && op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
		return 1;
	tp = bpf_skc_to_tcp_sock(sk);
	if (!tp)
		return 1;
	if (op == BPF_SOCK_OPS_TCP_CONNECT_CB)
		on_dial(ctx, sk, tp);
	else if (op == BPF_SOCK_OPS_HDR_OPT_LEN_CB)
		on_packet(ctx, sk, tp);
	else if (op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB)
		on_active(ctx, sk, tp);
	else
		on_passive(ctx, sk, tp);
	return 1;
}

/* A message ----------------------------------------------------------------------------------- */

/* STREAM_NONE if the message may pass TCP by; else why this and all that follow may not. */
static __always_inline __u32 judge(const struct stream_val *stream, struct stream_pair *pair,
				   const struct tcp_sock *tp, __u32 bytes)
{
	struct stream_sent *ours, *theirs;
	__u32 why = READ_ONCE(pair->why);

	if (why)
		return why;
	if (!READ_ONCE(pair->ready) || tp->write_seq != stream->first_out ||
	    tp->rcv_nxt != stream->first_in)
		return STREAM_TO_TCP_EARLY;
	if (!may_redirect(stream->svc))
		return STREAM_TO_TCP_OPTED_OUT;
	if (has_option(tp))
		return STREAM_TO_TCP_OPTION;
	if (is_short_of_memory(tp))
		return STREAM_TO_TCP_PRESSURE;
	ours = &pair->sent[stream->side & 1];
	theirs = &pair->sent[~stream->side & 1];
	if (has_read_all(tp)) {
		WRITE_ONCE(theirs->messages, 0);
		WRITE_ONCE(theirs->bytes, 0);
	}
	if (bytes > config.bytes || READ_ONCE(ours->bytes) + bytes > config.bytes ||
	    READ_ONCE(ours->messages) >= config.messages)
		return STREAM_TO_TCP_BUDGET;
	__sync_fetch_and_add(&ours->messages, 1);
	__sync_fetch_and_add(&ours->bytes, bytes);
	return STREAM_NONE;
}

/* The one exit of messages. */
static __always_inline int leave(struct stream_val *stream, __u32 why, __u32 bytes)
{
	if (!why) {
		stream->messages++;
		stream->bytes += bytes;
		make_good(stream);
		count_event(STREAM_REDIRECTED, bytes);
		return SK_PASS;
	}
	stream->why = why;
	count_event(STREAM_TCP, bytes);
	return SK_PASS;
}

SEC("sk_msg")
int shunt_stream(struct sk_msg_md *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct stream_end_key other = {};
	struct stream_val *stream;
	struct stream_pair *pair;
	struct tcp_sock *tp;
	__u32 why;

	if (!sk)
		return SK_PASS;
	stream = bpf_sk_storage_get(&sock_streams, sk, 0, 0);
	if (!stream)
		return SK_PASS;
	if (stream->why)
		return leave(stream, stream->why, ctx->size);
	pair = find_pair(stream);
	tp = bpf_skc_to_tcp_sock(sk);
	if (!pair || !tp) {
		count_event(STREAM_TO_TCP_ENDED, 0);
		return leave(stream, STREAM_TO_TCP_ENDED, ctx->size);
	}
	why = judge(stream, pair, tp, ctx->size);
	if (!why) {
		other.pair = stream->pair;
		other.side = ~stream->side & 1;
		if (bpf_msg_redirect_hash(ctx, &sock_ends, &other, BPF_F_INGRESS) != SK_PASS)
			why = STREAM_TO_TCP_ENDED;
	}
	/* The other end too: one direction alone gains nothing. Who is first counts. */
	if (why && !__sync_val_compare_and_swap(&pair->why, STREAM_NONE, why))
		count_event(why, 0);
	return leave(stream, why, ctx->size);
}

/* Options that come later ---------------------------------------------------------------------- */

/* asm-generic/socket.h. The new ones have times of 64 bits on every machine. */
#define SOL_SOCKET	    1
#define SO_RCVLOWAT	    18
#define SO_TIMESTAMP_OLD    29
#define SO_TIMESTAMPNS_OLD  35
#define SO_TIMESTAMPING_OLD 37
#define SO_PEEK_OFF	    42
#define SO_ZEROCOPY	    60
#define SO_TIMESTAMP_NEW    63
#define SO_TIMESTAMPNS_NEW  64
#define SO_TIMESTAMPING_NEW 65

/* Whether it is one of has_option(), which can be had by going back to TCP. */
static __always_inline bool is_tcps(__s32 option, __s32 value)
{
	switch (option) {
	case SO_RCVLOWAT:
		return value > 1;
	case SO_PEEK_OFF:
		return value >= 0;
	case SO_TIMESTAMP_OLD:
	case SO_TIMESTAMPNS_OLD:
	case SO_TIMESTAMPING_OLD:
	case SO_TIMESTAMP_NEW:
	case SO_TIMESTAMPNS_NEW:
	case SO_TIMESTAMPING_NEW:
		return value;
	default:
		return false;
	}
}

SEC("cgroup/setsockopt")
int shunt_streamopt(struct bpf_sockopt *ctx)
{
	struct stream_val *stream;
	struct stream_pair *pair;
	int *value = ctx->optval;

	if (ctx->optlen > 4096)
		ctx->optlen = 0; /* more than is shown here: as the process has it */
	if (ctx->level != SOL_SOCKET || !ctx->sk || value + 1 > (int *)ctx->optval_end)
		return 1;
	if (ctx->optname != SO_ZEROCOPY && !is_tcps(ctx->optname, *value))
		return 1;
	stream = bpf_sk_storage_get(&sock_streams, ctx->sk, 0, 0);
	if (!stream || stream->gone)
		return 1;
	pair = find_pair(stream);
	if (!pair)
		return 1;
	if (ctx->optname != SO_ZEROCOPY) {
		if (!__sync_val_compare_and_swap(&pair->why, STREAM_NONE, STREAM_TO_TCP_OPTION))
			count_event(STREAM_TO_TCP_OPTION, 0);
		return 1;
	}
	if (!*value)
		return 1;
	count_event(STREAM_REFUSED_ZEROCOPY, 0);
	bpf_set_retval(-EOPNOTSUPP);
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
