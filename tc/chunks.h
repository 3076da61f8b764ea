/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Which chunks a packet of SCTP has, for the tracker. */
#ifndef SHUNT_CHUNKS_H
#define SHUNT_CHUNKS_H

#include "parse.h"

/* A bit for each of enum sctp_chunk, up to the first DATA; 0 if the packet is none that SCTP sends. Not
 * static: verified once. */
__noinline __u32 see_chunks(struct __sk_buff *ctx, const struct packet *pkt)
{
	__u32 offset, stop, seen = 0;
	struct sctp_start start;

	if (!pkt || bpf_skb_load_bytes(ctx, pkt->l4, &start, sizeof(start)))
		return 0;
	if (!start.tag != (start.chunk.type == SCTP_INIT))
		return 0;
	offset = pkt->l4 + offsetof(struct sctp_start, chunk);
	stop = ETH_HLEN + pkt->ip_len;
	for (int i = 0; i < SCTP_CHUNKS_MAX; i++) {
		struct sctp_chunk_header chunk;
		__u32 length;

		if (offset + sizeof(chunk) > stop)
			break;
		if (bpf_skb_load_bytes(ctx, offset, &chunk, sizeof(chunk)))
			return 0;
		length = bpf_ntohs(chunk.length);
		if (length < sizeof(chunk))
			return 0;
		seen |= 1U << (chunk.type < SCTP_OTHER ? chunk.type : SCTP_OTHER);
		if (chunk.type == SCTP_DATA)
			break;
		offset += (length + 3) & ~3U;
	}
	return seen;
}

#endif
