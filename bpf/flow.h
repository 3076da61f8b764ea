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

#include "backend.h"
#include "parse.h"

static __always_inline struct flow_line *line_at(void *table, __u32 index)
{
	return bpf_map_lookup_elem(table, &index);
}

#include "flow_table.h"

/* An unconfirmed or a closing flow is forgotten after this; so are settled UDP flows. */
#define SHORT_IDLE_NS (60 * NS_PER_S)

/* When a flow was seen is written at most this often, so that a busy flow's line stays clean. */
#define TOUCH_NS NS_PER_S

/* How far above its SYN's sequence number a flow's first packets may be. */
#define ISN_WINDOW (1 << 20)

struct place { /* where a packet falls in the tables */
	__u32 svc;
	__u32 slot;
	__u32 cur;
	__u32 prev;
	__u32 state;
	__u32 flags;   /* enum svc_flag */
	__u32 named;   /* the backend that the packet's connection id names; 0 = none */
	__u32 certain; /* and that it is not the client who chose the id */
	__u64 idle_ns;
};

/* Whether flows are looked up: elsewhere the hash alone decides. */
static __always_inline bool keeps_state(const struct place *p)
{
	return p->state != SLOT_SETTLED || p->flags & SVC_AFFINITY;
}

static __always_inline __u64 idle_limit(__u8 state, __u64 idle_ns)
{
	return state == FLOW_CONFIRMED || idle_ns < SHORT_IDLE_NS ? idle_ns : SHORT_IDLE_NS;
}

static __always_inline bool older(__u64 ticks, __u64 limit_ns)
{
	/* Another processor's clock may be ahead: a negative age is no age. Both are rounded down,
	 * hence one more. */
	return (__s64)ticks > (__s64)(limit_ns >> FLOW_TICK_SHIFT) + 1;
}

/* The backend a remembered flow has, or 0 if nothing (any more) speaks for this packet. `*up`:
 * whether it gets packets. */
static __always_inline __u32 recall(const struct flow_at *at, const struct packet *pkt,
				    const struct place *p, __u64 now, bool *up)
{
	__u32 id = flow_backend(at->word), state = flow_state(at->word), next = state;
	__u64 age = (now >> FLOW_TICK_SHIFT) - flow_seen(at->word);
	__u8 flags = backend_flags(id);

	/* What was seen last may lag by TOUCH_NS. */
	if (older(age, idle_limit(state, p->idle_ns) + TOUCH_NS) || !(flags & BACKEND_KNOWN))
		return 0;
	*up = flags & BACKEND_UP;
	if (opens(pkt)) {
		if (state == FLOW_CLOSING)
			return 0;
		if (state == FLOW_OPENING && !DRY_RUN)
			WRITE_ONCE(at->line->isn, pkt->seq);
	} else if (state == FLOW_OPENING) {
		if (pkt->seq - READ_ONCE(at->line->isn) > ISN_WINDOW)
			return 0; /* of an older flow with the same tuple */
		next = FLOW_CONFIRMED;
	}
	if (closes(pkt))
		next = FLOW_CLOSING;
	/* If the word has changed by now, another processor has just seen the flow too. */
	if (!DRY_RUN && (next != state || older(age, TOUCH_NS)))
		__sync_val_compare_and_swap(&at->line->word, at->word, flow_word(id, next, now));
	return id;
}

/* A remembered flow's backend, to look at only; 0 = nothing speaks for it. */
static __always_inline __u32 peek_at(const struct flow_key *key, __u32 hash, __u64 limit_ns,
				     __u32 down)
{
	struct flow_at at = {};
	__u32 id;
	__u8 flags;

	if (!flow_find(&flows, config.flows_mask, key, hash, &at))
		return 0;
	id = flow_backend(at.word);
	flags = backend_flags(id);
	if (!(flags & BACKEND_KNOWN) ||
	    older((now_ns() >> FLOW_TICK_SHIFT) - flow_seen(at.word), limit_ns))
		return 0;
	return flags & BACKEND_UP ? id : down;
}

/* Not static: verified once, and not again for each packet that may get here. */

/* Forget a flow, unless it has changed. */
__noinline int forget_flow(__u32 hash, __u64 word, __u32 distance)
{
	struct flow_at at = {
		.line = line_at(&flows, (hash + distance) & config.flows_mask),
		.word = word,
		.distance = distance,
	};

	step(STEP_FLOW_FORGOTTEN, 0, word);
	return !DRY_RUN && at.line && flow_delete(&flows, config.flows_mask, &at, FLOW_BY_PROGRAM);
}

/* Puts a flow into the table; the result's other part is `*word`, as the table has it now. `old` and
 * `distance` tell of the line that has this key already; `old` is 0 if there is none. */
static __always_inline enum flow_inserted put_flow(const struct flow_key *key, __u32 hash,
						   __u32 isn, __u64 *word, __u64 old,
						   __u32 distance)
{
	if (DRY_RUN) {
		/* Of an argument that nobody reads clang passes rubbish, which the verifier
		 * refuses ("Caller passes invalid args"). */
		barrier_var(distance);
		return old || flow_has_room(&flows, config.flows_mask, hash) ? FLOW_INSERTED :
									       FLOW_NO_ROOM;
	}
	if (old) {
		struct flow_at at = {
			.line = line_at(&flows, (hash + distance) & config.flows_mask),
			.word = old,
		};

		if (at.line && flow_renew(&at, isn, *word, FLOW_BY_PROGRAM))
			return FLOW_INSERTED;
	}
	return flow_insert(&flows, config.flows_mask, key, hash, isn, word, FLOW_BY_PROGRAM);
}

/* The backend that is remembered now, this one or another processor's choice; 0 = none. `old` and
 * `distance` tell of what stands in the table but does not speak for this packet. */
__noinline __u32 store_flow(const struct packet *pkt, __u64 word, __u64 old, __u32 distance)
{
	if (!pkt)
		return 0;
	switch (put_flow(&pkt->key, pkt->hash, pkt->seq, &word, old, distance)) {
	case FLOW_INSERTED:
		note(EVENT_FLOW_REMEMBERED);
		return flow_backend(word);
	case FLOW_THERE:
		return flow_backend(word);
	default:
		note(EVENT_FLOW_TABLE_FULL);
		return 0;
	}
}

/* Under which a service with affinity remembers a client. */
static __always_inline void client_key(const struct packet *pkt, __u32 svc, struct flow_key *key)
{
	*key = (struct flow_key){.proto = pkt->key.proto, .kind = FLOW_KIND_CLIENT};
	__builtin_memcpy(key->saddr, pkt->key.saddr, 16);
	*(__u64 *)key->daddr = svc;
}

/* The backend for a new connection of this client: the one that its last had, while it takes new
 * ones; else `fallback`, which is then remembered. */
__noinline __u32 affine_backend(const struct packet *pkt, __u32 svc, __u32 fallback)
{
	struct svc_options *o = bpf_map_lookup_elem(&svc_options, &svc);
	const __u8 usable = BACKEND_KNOWN | BACKEND_UP;
	struct flow_key key __attribute__((aligned(8)));
	__u64 now = now_ns(), word, age;
	struct flow_at at = {};
	__u32 hash;

	if (!pkt || !o)
		return fallback;
	hash = client_hash(&pkt->key, svc);
	client_key(pkt, svc, &key);
	if (flow_find(&flows, config.flows_mask, &key, hash, &at)) {
		__u32 id = flow_backend(at.word);

		age = (now >> FLOW_TICK_SHIFT) - flow_seen(at.word);
		if (!older(age, o->affinity_ns) &&
		    (backend_flags(id) & (usable | BACKEND_DRAINED | BACKEND_REMOVED)) == usable) {
			step(STEP_CLIENT, id, 1);
			if (!DRY_RUN && older(age, TOUCH_NS))
				flow_swap(at.line, at.word, flow_word(id, FLOW_CONFIRMED, now));
			return id;
		}
	}
	if (!fallback)
		return 0;
	word = flow_word(fallback, FLOW_CONFIRMED, now);
	if (!spend(BUDGET_INSERTS) ||
	    put_flow(&key, hash, 0, &word, at.word, at.distance) == FLOW_NO_ROOM) {
		note(EVENT_CLIENT_NOT_REMEMBERED);
		return fallback;
	}
	step(STEP_CLIENT, flow_backend(word), 0);
	note(EVENT_CLIENT_REMEMBERED);
	return flow_backend(word);
}

/* The backend that is remembered now; 0 = the flow could not be, and nothing of it is. */
static __always_inline __u32 remember(const struct packet *pkt, __u32 id, __u64 now,
				      const struct flow_at *at)
{
	__u32 state = closes(pkt) ? FLOW_CLOSING : opens(pkt) ? FLOW_OPENING : FLOW_CONFIRMED;

	if (spend(BUDGET_INSERTS)) {
		id = store_flow(pkt, flow_word(id, state, now), at->word, at->distance);
	} else {
		note(EVENT_FLOW_OVER_BUDGET);
		id = 0;
	}
	/* What an entry said of an ended flow must not divert the next packet. */
	if (!id && at->word)
		forget_flow(pkt->hash, at->word, at->distance);
	return id;
}

static __always_inline void restart_window(__u32 slot)
{
	__u32 index = slot / RESTARTS_PER_VAL;
	struct restarts_val *r = bpf_map_lookup_elem(&restarts, &index);

	step(STEP_RESTART, slot, 0);
	if (r)
		WRITE_ONCE(r->slot[slot % RESTARTS_PER_VAL], 1);
}

/* The backend of a packet on a slot that is not settled, or of a service with affinity; 0 = the
 * service has none. */
static __always_inline __u32 track(const struct packet *pkt, const struct place *p)
{
	__u64 now = now_ns();
	struct flow_at at = {};
	bool found = flow_find(&flows, config.flows_mask, &pkt->key, pkt->hash, &at);
	bool affinity = p->flags & SVC_AFFINITY, up = false, prev_up;
	__u32 id = found ? recall(&at, pkt, p, now, &up) : 0, old, kept;

	step(STEP_FLOW, id, found ? at.word : 0);
	if (id)
		return up ? id : p->cur;
	if (p->state == SLOT_LINGERING && !affinity) {
		/* A new connection on an ended one's tuple: its next packets must not follow
		 * what is remembered of that. */
		if (found && opens(pkt))
			forget_flow(pkt->hash, at.word, at.distance);
		return p->cur;
	}
	prev_up = is_up(p->prev);
	old = prev_up ? p->prev : p->cur;
	id = opens(pkt) ? p->cur : old;
	if (affinity && (opens(pkt) || pkt->key.proto == IPPROTO_UDP))
		id = affine_backend(pkt, p->svc, id);
	if (!id)
		return 0;
	if (p->state != SLOT_MOVING && id == p->cur) {
		/* Its next packets find it without being remembered. */
		if (found)
			forget_flow(pkt->hash, at.word, at.distance);
		return id;
	}
	kept = remember(pkt, id, now, &at);
	if (kept)
		return kept;
	/* Its next packet, unremembered, will go to `old` too. */
	if (!prev_up)
		note(EVENT_FLOW_UNPROTECTED);
	restart_window(p->slot);
	return old;
}

#endif
