/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* None of the protocols with ports, or a fragment without them. */
#ifndef SHUNT_RELATED_H
#define SHUNT_RELATED_H

#include "fragment.h"
#include "icmp.h"

/* What a look_*() returns; `why` is what parse() says of the packet. */
static __always_inline __u64 look_related(struct CONTEXT *ctx, struct packet *pkt, enum reason why)
{
	__u64 found = LOOK_NOTHING;

	if (why == REASON_PASS_FRAGMENT)
		return look_fragment(ctx, pkt);
	if (why == REASON_PASS_NOT_OURS && is_icmp(pkt)) {
		found = look_icmp(ctx, pkt);
		if (pkt->quote)
			found = look_quote(pkt);
	}
	return found;
}

#endif
