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
 *   broken            RST, or           RST               10 s
 *
 * UDP: new until the client sends after an answer (30 s), then assured (the service's idle time).
 *
 * There are no windows here: that a segment's numbers fit is for the two ends to judge.
 */
#ifndef SHUNT_TRACK_H
#define SHUNT_TRACK_H

#include "parse.h"

#define NAT_INVALID (1U << 31) /* no bit of enum nat_track: the packet is refused */

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

/* What is known of the flow with this packet, or NAT_INVALID. */
static __always_inline __u32 track_step(__u32 bits, const struct packet *pkt, bool reply)
{
	__u8 flags = pkt->tcp_flags & TCP_STATE_FLAGS;

	if (pkt->key.proto == IPPROTO_UDP)
		return bits | (reply ? NAT_ANSWERED : bits & NAT_ANSWERED ? NAT_ASSURED : 0);
	if (flags & TCP_RST)
		return flags & (TCP_SYN | TCP_FIN) ? NAT_INVALID : bits | NAT_BROKEN;
	return reply ? track_backend(bits, flags) : track_client(bits, flags);
}

/* Whether the flow is over, so that a SYN in its tuple is another's. */
static __always_inline bool track_over(__u32 bits)
{
	const __u32 both = NAT_ENDED_CLIENT | NAT_ENDED_BACKEND;

	return bits & NAT_BROKEN || (bits & both) == both;
}

#endif
