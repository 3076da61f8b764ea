/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* From a backend: the tuple that the client knows is put back. */
#ifndef SHUNT_REPLY_H
#define SHUNT_REPLY_H

#include "forward.h"

enum replied { REPLY_NONE, REPLY_REFUSED, REPLY_LOCAL, REPLY_REMOTE, REPLY_MASQUERADED };

/* What the packet is a reply to; the tuple it gets and (REPLY_REMOTE) its way are left in the scratch
 * memory. */
static __noinline enum replied recall_reply(const struct packet *pkt, struct nat_scratch *s)
{
	struct nat_rev_val *rev = look_back(&pkt->key, pkt->hash, s);
	struct nat_fwd_val *fwd;
	__u32 bits, next;
	__u64 now;

	step(STEP_NAT_REPLY, rev ? 1 : 0, rev ? rev->svc : 0);
	if (!rev)
		return REPLY_NONE;
	s->to.scope = SCOPE_EXTERNAL;
	bits = READ_ONCE(rev->track);
	if (bits & NAT_TRACKED) {
		next = track_step(bits, pkt, true);
		if (next & NAT_INVALID)
			return REPLY_REFUSED;
		if (next != bits) {
			reverse(&s->to, &s->key);
			fwd = bpf_map_lookup_elem(&nat_fwd, &s->key);
			keep_track(&rev->track, fwd ? &fwd->track : NULL, bits, next);
		}
	}
	if (!DRY_RUN)
		note_backend(rev, pkt);
	now = now_ns();
	if (!DRY_RUN && (__s64)(now - rev->seen_ns) > (__s64)TOUCH_NS)
		WRITE_ONCE(rev->seen_ns, now);
	if (bits & NAT_MASQUERADED)
		return REPLY_MASQUERADED;
	/* What was handed over may come back by the stack: the backend's device has no program, or had none. */
	if (!s->back.ifindex || (rev->handed && pkt->way == WAY_TC_OUT))
		return REPLY_LOCAL;
	return REPLY_REMOTE;
}

/* `local`: whether replies of backends on this node are looked for, or of others; the latter are for an
 * address of this host. */
static __always_inline bool reply(struct __sk_buff *ctx, struct packet *pkt, struct nat_scratch *s,
				  bool local, struct verdict *v)
{
	enum replied found = recall_reply(pkt, s);

	if (found == REPLY_NONE)
		return false;
	if (found == REPLY_REFUSED)
		*v = verdict(XDP_DROP, REASON_DROP_NAT_INVALID);
	else if ((found == REPLY_LOCAL) != local)
		return false;
	else if (crosses(pkt, &s->to))
		*v = verdict(XDP_DROP, REASON_DROP_NAT46_NOT_XDP);
	else if (local || found == REPLY_MASQUERADED)
		*v = pass_on(ctx, pkt, &s->to);
	else
		*v = send_back(ctx, pkt, &s->back, &s->to);
	if (v->reason == REASON_SENT_TO_BACKEND)
		v->reason = REASON_SENT_TO_CLIENT;
	return true;
}

#endif
