/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Adaptive flow tracking: which backend a packet on a slot that is not settled belongs to.
 *
 * A settled slot needs none of this: its hash alone decides. While a slot moves, flows are
 * remembered with the backend they have; once no change has come for a whole idle window, only
 * those that differ from the slot's owner are left, and when they have ended the slot settles.
 */
#ifndef SHUNT_FLOW_H
#define SHUNT_FLOW_H

#include "parse.h"

/* An unconfirmed or a closing flow is forgotten after this; so are settled UDP flows. */
#define SHORT_IDLE_NS (60 * NS_PER_S)

/* `seen_ns` is written at most this often, so that a busy flow's line is not dirtied. */
#define TOUCH_NS NS_PER_S

/* How far above its SYN's sequence number a flow's first packets may be. */
#define ISN_WINDOW (1 << 20)

struct place { /* where a packet falls in the tables */
	__u32 svc;
	__u32 slot;
	__u32 cur;
	__u32 prev;
	__u32 state;
	__u64 idle_ns;
};

static __always_inline __u8 backend_flags(__u32 id)
{
	struct backend_val *b;

	if (!id)
		return 0;
	b = bpf_map_lookup_elem(&backends, &id);
	return b ? READ_ONCE(b->flags) : 0;
}

static __always_inline bool is_up(__u32 id)
{
	return (backend_flags(id) & (BACKEND_KNOWN | BACKEND_UP)) == (BACKEND_KNOWN | BACKEND_UP);
}

static __always_inline __u64 idle_limit(__u8 state, __u64 idle_ns)
{
	return state == FLOW_CONFIRMED || idle_ns < SHORT_IDLE_NS ? idle_ns : SHORT_IDLE_NS;
}

/* The backend a remembered flow has, or 0 if nothing (any more) speaks for this packet. */
static __always_inline __u32 recall(struct flow_val *flow, const struct packet *pkt,
				    const struct place *p, __u64 now)
{
	__u64 word = READ_ONCE(flow->word), seen = READ_ONCE(flow->seen_ns);
	__u32 id = word;

	if (word >> 32 != pkt->hash) /* recycled under us */
		return 0;
	/* `seen` may lag by TOUCH_NS. Another processor's clock may be ahead: a negative age is
	 * no age. */
	if ((__s64)(now - seen) > (__s64)(idle_limit(flow->state, p->idle_ns) + TOUCH_NS))
		return 0;
	if (!(backend_flags(id) & BACKEND_KNOWN))
		return 0;
	if (opens(pkt)) {
		if (flow->state == FLOW_CLOSING)
			return 0;
		if (flow->state == FLOW_OPENING)
			flow->isn = pkt->seq;
	} else if (flow->state == FLOW_OPENING) {
		if (pkt->seq - flow->isn > ISN_WINDOW)
			return 0; /* of an older flow with the same tuple */
		flow->state = FLOW_CONFIRMED;
	}
	if (closes(pkt))
		flow->state = FLOW_CLOSING;
	if ((__s64)(now - seen) > (__s64)TOUCH_NS)
		WRITE_ONCE(flow->seen_ns, now);
	return id;
}

/* False if the flow could not be remembered; then nothing of it is. */
static __always_inline bool remember(const struct packet *pkt, const struct place *p, __u32 id,
				     __u64 now, bool had_entry)
{
	struct flow_val val = {
		.word = (__u64)pkt->hash << 32 | id,
		.seen_ns = now,
		.svc = p->svc,
		.isn = pkt->seq,
		.state = opens(pkt) ? FLOW_OPENING : FLOW_CONFIRMED,
	};

	if (closes(pkt))
		val.state = FLOW_CLOSING;
	if (!spend(BUDGET_INSERTS)) {
		note(EVENT_FLOW_OVER_BUDGET);
	} else if (bpf_map_update_elem(&flows, &pkt->key, &val, BPF_ANY)) {
		note(EVENT_FLOW_TABLE_FULL);
	} else {
		note(EVENT_FLOW_REMEMBERED);
		return true;
	}
	/* What an entry said of an ended flow must not divert the next packet. */
	if (had_entry)
		bpf_map_delete_elem(&flows, &pkt->key);
	return false;
}

static __always_inline void restart_window(__u32 slot)
{
	__u32 index = slot / RESTARTS_PER_VAL;
	struct restarts_val *r = bpf_map_lookup_elem(&restarts, &index);

	if (r)
		WRITE_ONCE(r->slot[slot % RESTARTS_PER_VAL], 1);
}

/* The backend of a packet on a moving or lingering slot; 0 = the service has none. */
static __always_inline __u32 track(const struct packet *pkt, const struct place *p)
{
	__u64 now = now_ns();
	struct flow_val *flow = bpf_map_lookup_elem(&flows, &pkt->key);
	__u32 id = flow ? recall(flow, pkt, p, now) : 0;
	bool prev_up;
	__u32 old;

	if (id)
		return is_up(id) ? id : p->cur;
	if (p->state == SLOT_LINGERING) {
		/* A new connection on an ended one's tuple: its next packets must not follow
		 * what is remembered of that. */
		if (flow && opens(pkt))
			bpf_map_delete_elem(&flows, &pkt->key);
		return p->cur;
	}
	prev_up = is_up(p->prev);
	old = prev_up ? p->prev : p->cur;
	id = opens(pkt) ? p->cur : old;
	if (id && remember(pkt, p, id, now, flow))
		return id;
	if (!id)
		return 0;
	/* Its next packet, unremembered, will go to `old` too. */
	if (!prev_up)
		note(EVENT_FLOW_UNPROTECTED);
	restart_window(p->slot);
	return old;
}

#endif
