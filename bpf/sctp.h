/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * SCTP (RFC 9260): ports where TCP and UDP have them, then chunks. The checksum is a CRC32c of the
 * whole packet: addresses are no part of it, ports are, and no program here could compute it anew.
 * So an association keeps its ports wherever it is translated.
 */
#ifndef SHUNT_SCTP_H
#define SHUNT_SCTP_H

#include "packet.h"

enum sctp_chunk {
	SCTP_DATA,
	SCTP_INIT,
	SCTP_INIT_ACK,
	SCTP_SACK,
	SCTP_HEARTBEAT,
	SCTP_HEARTBEAT_ACK,
	SCTP_ABORT,
	SCTP_SHUTDOWN,
	SCTP_SHUTDOWN_ACK,
	SCTP_ERROR,
	SCTP_COOKIE_ECHO,
	SCTP_COOKIE_ACK,
	SCTP_SHUTDOWN_COMPLETE = 14,
	SCTP_OTHER = 31, /* of a packet's set of chunks: whatever else is in it */
};

struct sctp_chunk_header {
	__u8 type;
	__u8 flags;
	__be16 length; /* padding aside */
};

struct sctp_start { /* of a packet; there is none without a chunk */
	__be16 source;
	__be16 dest;
	__be32 tag; /* 0 in an INIT, and nowhere else (8.5.1) */
	__u32 checksum;
	struct sctp_chunk_header chunk;
};

/* Control chunks come before DATA (6.10), and hardly ever more than three. */
#define SCTP_CHUNKS_MAX 8

/* For packet.seq: no packet that comes right after an INIT. */
#define SCTP_LATER (1U << 31)

#endif
