/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What an ICMP error is in the other family (RFC 7915, 4.2 and 5.2). */
#ifndef SHUNT_NAT46_ERRORS_H
#define SHUNT_NAT46_ERRORS_H

#include "nat46.h"

#define ICMP_HOST_UNREACHABLE	   1
#define ICMP_PROTOCOL_UNREACHABLE  2
#define ICMP_NET_PROHIBITED	   9
#define ICMP_HOST_PROHIBITED	   10
#define ICMP_PROHIBITED		   13
#define ICMP_PRECEDENCE_VIOLATED   14
#define ICMP_PRECEDENCE_CUTOFF	   15
#define ICMP_POINTER		   0
#define ICMP_OPTION_MISSING	   1
#define ICMP_BAD_LENGTH		   2
#define ICMPV6_NO_ROUTE		   0
#define ICMPV6_PROHIBITED	   1
#define ICMPV6_BEYOND_SCOPE	   2
#define ICMPV6_ADDR_UNREACHABLE	   3
#define ICMPV6_ERRONEOUS_FIELD	   0
#define ICMPV6_UNKNOWN_NEXT_HEADER 1

/* What an error says: type, code, and the word after the checksum in host order. */
struct icmp_words {
	__u32 type;
	__u32 code;
	__u32 info;
};

/* Headers as their fields come: of which field of the other family each octet is a part. 0xff: of
 * none. (RFC 7915, figures 3 and 6.) */
static __always_inline __u32 pointer6_of(__u32 pointer4)
{
	switch (pointer4) {
	case 0: /* version */
	case 1: /* DSCP */
		return pointer4;
	case 2: /* length */
	case 3:
		return 4;
	case 8: /* TTL */
		return 7;
	case 9: /* protocol */
		return 6;
	case 12 ... 15:
		return 8;
	case 16 ... 19:
		return 24;
	default:
		return 0xff;
	}
}

static __always_inline __u32 pointer4_of(__u32 pointer6)
{
	switch (pointer6) {
	case 0:
	case 1:
		return pointer6;
	case 4: /* length */
	case 5:
		return 2;
	case 6: /* next header */
		return 9;
	case 7: /* hop limit */
		return 8;
	case 8 ... 23:
		return 12;
	case 24 ... 39:
		return 16;
	default:
		return 0xff;
	}
}

/* The MTU of a router that does not tell it, from the length of what it did not send on (RFC 1191, 7).
 * Less than 1280 - 20 is never told. */
static __always_inline __u32 plateau_below(__u32 len)
{
	return len > 32000 ? 32000 :
	       len > 17914 ? 17914 :
	       len > 8166  ? 8166 :
	       len > 4352  ? 4352 :
	       len > 2002  ? 2002 :
	       len > 1492  ? 1492 :
			     0;
}

/* `quoted`: the length of what is quoted. False if ICMPv6 has nothing like it. */
static __always_inline bool to_icmp6(struct icmp_words *e, __u32 quoted)
{
	__u32 type = e->type, code = e->code, info = e->info;

	e->info = 0;
	if (type == ICMP_TIME_EXCEEDED) {
		e->type = ICMPV6_TIME_EXCEEDED;
		return true;
	}
	if (type == ICMP_BAD_HEADER) {
		e->type = ICMPV6_BAD_HEADER;
		e->code = ICMPV6_ERRONEOUS_FIELD;
		e->info = pointer6_of(info >> 24);
		return (code == ICMP_POINTER || code == ICMP_BAD_LENGTH) && e->info != 0xff;
	}
	e->type = ICMPV6_UNREACHABLE;
	switch (code) {
	case ICMP_PROTOCOL_UNREACHABLE:
		e->type = ICMPV6_BAD_HEADER;
		e->code = ICMPV6_UNKNOWN_NEXT_HEADER;
		e->info = 6; /* where the next header is */
		return true;
	case ICMP_PORT_UNREACHABLE:
		e->code = ICMPV6_PORT_UNREACHABLE;
		return true;
	case ICMP_TOO_BIG:
		e->type = ICMPV6_TOO_BIG;
		e->code = 0;
		e->info = crossed_mtu(false, info & 0xffff ?: plateau_below(quoted));
		return true;
	case ICMP_NET_PROHIBITED:
	case ICMP_HOST_PROHIBITED:
	case ICMP_PROHIBITED:
	case ICMP_PRECEDENCE_CUTOFF:
		e->code = ICMPV6_PROHIBITED;
		return true;
	default:
		e->code = ICMPV6_NO_ROUTE;
		return code < ICMP_PROHIBITED;
	}
}

static __always_inline bool to_icmp4(struct icmp_words *e)
{
	__u32 type = e->type, code = e->code, info = e->info;

	e->info = 0;
	switch (type) {
	case ICMPV6_TIME_EXCEEDED:
		e->type = ICMP_TIME_EXCEEDED;
		return true;
	case ICMPV6_TOO_BIG:
		e->type = ICMP_UNREACHABLE;
		e->code = ICMP_TOO_BIG;
		if (info > 0xffff)
			info = 0xffff;
		if (info < IPV6_MTU_MIN)
			info = IPV6_MTU_MIN;
		e->info = crossed_mtu(true, info);
		return true;
	case ICMPV6_BAD_HEADER:
		if (code == ICMPV6_UNKNOWN_NEXT_HEADER) {
			e->type = ICMP_UNREACHABLE;
			e->code = ICMP_PROTOCOL_UNREACHABLE;
			return true;
		}
		e->type = ICMP_BAD_HEADER;
		e->code = ICMP_POINTER;
		e->info = pointer4_of(info) << 24;
		return code == ICMPV6_ERRONEOUS_FIELD && e->info != 0xffU << 24;
	default:
		e->type = ICMP_UNREACHABLE;
		e->code = code == ICMPV6_PROHIBITED	  ? ICMP_HOST_PROHIBITED :
			  code == ICMPV6_PORT_UNREACHABLE ? ICMP_PORT_UNREACHABLE :
							    ICMP_HOST_UNREACHABLE;
		return code <= ICMPV6_PORT_UNREACHABLE;
	}
}

#endif
