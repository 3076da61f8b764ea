/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Mode dsr-geneve on the wire (RFC 8926): UDP, Geneve, and one option with what the client has sent
 * its packet to. The inner packet has no Ethernet header, and its destination is the backend's own
 * address and port; if the backend has no address of the packet's family, the VIP and that port.
 */
#ifndef SHUNT_GENEVE_H
#define SHUNT_GENEVE_H

#include <linux/types.h>
#include <linux/udp.h>

#define GENEVE_PORT	     6081
#define GENEVE_SPORT_MIN     0xc000 /* where source ports begin; the rest is the flow's hash */
#define GENEVE_SPORT_MASK    0x3fff
#define GENEVE_CRITICAL	     0x40   /* of the second octet: an option is critical */
#define GENEVE_CLASS	     0xff53 /* of those for experiments (RFC 8926, 7) */
#define GENEVE_TYPE_FRONTEND 0x81   /* critical: who does not know it must not take the packet */
#define GENEVE_WORD	     4

struct geneve_frontend {
	__be16 opt_class;
	__u8 type;
	__u8 words;   /* of what follows */
	__u8 vip[16]; /* IPv6, or IPv4-mapped */
	__be16 port;
	__be16 pad; /* zero */
};

/* From the UDP header to the inner packet. */
struct geneve_headers {
	struct udphdr udp;
	__u8 words; /* version 0, and how long the options are */
	__u8 flags;
	__be16 proto; /* EtherType of the inner packet */
	__be32 vni;   /* zero */
	struct geneve_frontend frontend;
} __attribute__((packed, aligned(4)));

#define GENEVE_OPTION_WORDS ((sizeof(struct geneve_frontend) - 4) / GENEVE_WORD)
#define GENEVE_WORDS	    (sizeof(struct geneve_frontend) / GENEVE_WORD)

#endif
