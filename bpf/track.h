/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The state of a flow that TC translates: enum nat_track.
 *
 *                     client            backend           forgotten after (agent/scan.py)
 *   half-open         SYN                                 60 s
 *     answered                          SYN-ACK           60 s
 *   established       ACK                                 the service's idle time
 *   closing           FIN, or           FIN               an hour
 *   closed            FIN and           FIN               60 s
 *   broken            RST, or           RST               10 s, unless the same side goes on
 *
 * SCTP:
 *   half-open         INIT                                60 s
 *     answered                          INIT ACK          60 s
 *     echoed          COOKIE ECHO                         60 s
 *   established                         COOKIE ACK        the service's idle time
 *   shutting down     SHUTDOWN, or      SHUTDOWN          300 s: T5 of RFC 9260, 9.2
 *   closed            SHUTDOWN ACK, or  SHUTDOWN ACK      60 s
 *   broken            ABORT, or         ABORT             10 s, likewise
 *
 * Whoever has broken a connection has nothing more to say. Where that side goes on (an ACK without SYN; DATA,
 * SACK or HEARTBEAT), the RST was not its own, or did not count for the other: the
 * connection is what it was before. What the other side had under way says nothing.
 *
 * UDP: new until the client sends after an answer (30 s), then assured (the service's idle time).
 *
 * Echo requests that are masqueraded: 30 s, whatever was seen.
 *
 * There are no windows here, nor verification tags: that a segment's numbers fit, or a chunk's tag, is
 * for the two ends to judge.
 */
#ifndef SHUNT_TRACK_H
#define SHUNT_TRACK_H

#include "parse.h"

#define NAT_INVALID (1U << 31) /* no bit of enum nat_track: the packet is refused */

#define NAT_BROKEN_ANY (NAT_BROKEN | NAT_BROKEN_BACKEND)

#define TCP_STATE_FLAGS (TCP_FIN | TCP_SYN | TCP_RST | TCP_ACK)

static __always_inline __u32 track_client(__u32 bits, __u8 flags)
{
	if (flags == TCP_SYN)
		return bits;
	/* Nothing can be acknowledged before the backend has said anything. */
	if (!(flags & TCP_ACK) || flags & TCP_SYN || !(bits & NAT_ANSWERED))
		return NAT_INVALID;
	return bits | NAT_ASSURED | (flags & TCP_FIN ? NAT_ENDED_CLIENT : 0);
}

static __always_inline __u32 track_backend(__u32 bits, __u8 flags)
{
	if (flags == (TCP_SYN | TCP_ACK))
		return bits | NAT_ANSWERED;
	if (!(flags & TCP_ACK) || flags & TCP_SYN)
		return NAT_INVALID;
	/* A challenge (RFC 5961) to a SYN is an ACK, of a connection that the backend still has. */
	if (!(bits & NAT_ANSWERED))
		return flags & TCP_FIN ? NAT_INVALID : bits;
	return bits | (flags & TCP_FIN ? NAT_ENDED_BACKEND : 0);
}

#define CHUNK(TYPE) (1U << SCTP_##TYPE)
/* None of these answers what is of no association (8.4). */
#define CHUNKS_LIVE  (CHUNK(DATA) | CHUNK(SACK) | CHUNK(HEARTBEAT) | CHUNK(HEARTBEAT_ACK))
#define CHUNKS_ALONE (CHUNK(INIT) | CHUNK(INIT_ACK) | CHUNK(SHUTDOWN_COMPLETE)) /* 6.10 */

/* The end of an association: both SHUTDOWNs have gone by before either end says COMPLETE. `own` and `other`
 * are the bits of the ends. */
static __always_inline __u32 track_shutdown(__u32 bits, __u32 chunks, __u32 own, __u32 other)
{
	if (chunks & CHUNK(SHUTDOWN_ACK) && !(bits & other))
		return NAT_INVALID;
	if (chunks & CHUNK(SHUTDOWN_COMPLETE) && (bits & (own | other)) != (own | other))
		return NAT_INVALID;
	return bits | (chunks & (CHUNK(SHUTDOWN) | CHUNK(SHUTDOWN_ACK)) ? own : 0);
}

static __always_inline __u32 track_sctp_client(__u32 bits, __u32 chunks)
{
	if (chunks == CHUNK(INIT))
		return bits;
	/* To the backend that has not heard of the last association's end, and says so (9.2). */
	if (chunks == CHUNK(SHUTDOWN_COMPLETE) && !(bits & NAT_ASSURED))
		return bits;
	/* The client's end is the one that opens. */
	if (chunks & (CHUNK(INIT_ACK) | CHUNK(COOKIE_ACK)) || !(bits & NAT_ANSWERED))
		return NAT_INVALID;
	if (chunks & CHUNK(COOKIE_ECHO))
		return bits | NAT_ECHOED;
	/* Nothing else is sent before the cookie is acknowledged (5.1). */
	if (!(bits & NAT_ASSURED))
		return NAT_INVALID;
	return track_shutdown(bits, chunks, NAT_ENDED_CLIENT, NAT_ENDED_BACKEND);
}

static __always_inline __u32 track_sctp_backend(__u32 bits, __u32 chunks)
{
	if (chunks == CHUNK(INIT_ACK))
		return bits | NAT_ANSWERED;
	if (chunks == CHUNK(SHUTDOWN_ACK) && !(bits & NAT_ASSURED))
		return bits; /* see above */
	/* Of an association it knows nothing before it has the cookie. */
	if (chunks & CHUNK(COOKIE_ECHO) || !(bits & NAT_ECHOED))
		return NAT_INVALID;
	if (chunks & CHUNK(COOKIE_ACK))
		bits |= NAT_ASSURED;
	return track_shutdown(bits, chunks, NAT_ENDED_BACKEND, NAT_ENDED_CLIENT);
}

static __always_inline __u32 track_sctp(__u32 bits, __u32 chunks, bool reply)
{
	__u32 broken = reply ? NAT_BROKEN_BACKEND : NAT_BROKEN;

	if (!chunks || (chunks & CHUNKS_ALONE && chunks & (chunks - 1)) ||
	    (reply && chunks & CHUNK(INIT)))
		return NAT_INVALID;
	if (chunks & CHUNK(ABORT))
		return bits | broken;
	bits = reply ? track_sctp_backend(bits, chunks) : track_sctp_client(bits, chunks);
	return chunks & CHUNKS_LIVE ? bits & ~broken : bits;
}

/* What is known of the flow with this packet, or NAT_INVALID. */
static __always_inline __u32 track_step(__u32 bits, const struct packet *pkt, bool reply)
{
	__u32 broken = reply ? NAT_BROKEN_BACKEND : NAT_BROKEN;
	__u8 flags = pkt->tcp_flags & TCP_STATE_FLAGS;

	if (pkt->key.proto == IPPROTO_SCTP)
		return track_sctp(bits, pkt->chunks, reply);
	if (pkt->key.proto != IPPROTO_TCP)
		return bits | (reply ? NAT_ANSWERED : bits & NAT_ANSWERED ? NAT_ASSURED : 0);
	if (flags & TCP_RST)
		return flags & (TCP_SYN | TCP_FIN) ? NAT_INVALID : bits | broken;
	bits = reply ? track_backend(bits, flags) : track_client(bits, flags);
	return flags & TCP_SYN ? bits : bits & ~broken;
}

/* Whether the flow is over, so that a SYN or INIT in its tuple is another's. */
static __always_inline bool track_over(__u32 bits)
{
	const __u32 both = NAT_ENDED_CLIENT | NAT_ENDED_BACKEND;

	return bits & NAT_BROKEN_ANY || (bits & both) == both;
}

#endif
