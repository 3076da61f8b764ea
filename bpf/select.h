/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* From a packet to its service and its slot: the same for XDP and TC. */
#ifndef SHUNT_SELECT_H
#define SHUNT_SELECT_H

#include "flow.h"

/* Such an address may be a VIP for this host's own processes, which get their backend at the socket.
 * From a wire nothing may come for it (RFC 1122, 3.2.1.3; RFC 4291, 2.5.3). */
static __always_inline bool is_loopback(const __u8 *addr, bool ipv6)
{
	const __u64 *words = (const __u64 *)addr;

	return ipv6 ? !words[0] && words[1] == bpf_cpu_to_be64(1) : addr[12] == 127;
}

static __always_inline __u32 find_service(const struct packet *pkt)
{
	__u64 unused;
	__u32 id =
		look_up_service(&pkt->key, pkt->ipv6, pkt->frontend, config.services_mask, &unused);

	return id && is_loopback(pkt->key.daddr, pkt->ipv6) ? 0 : id;
}

/* Where the packet falls; NULL if the tables contradict each other. */
static __always_inline struct slot_val *slot_of(const struct packet *pkt, __u32 first, __u32 log2,
						__u32 *slot)
{
	*slot = first + (__u32)((__u64)pkt->hash << log2 >> 32);
	return bpf_map_lookup_elem(&slots, slot);
}

static __always_inline void step_slot(const struct packet *pkt, __u32 log2, __u32 slot, __u64 word)
{
	step(STEP_HASH, pkt->hash, log2);
	step(STEP_SLOT, slot, word);
}

static __always_inline struct slot_val *find_slot(const struct packet *pkt,
						  const struct svc_val *service, __u32 *slot)
{
	__u64 region = READ_ONCE(service->region);
	__u32 log2 = region & ((1 << REGION_LOG2_BITS) - 1);
	struct slot_val *s = slot_of(pkt, region >> REGION_LOG2_BITS, log2, slot);

	step_slot(pkt, log2, *slot, s ? s->word : 0);
	return s;
}

static __always_inline struct place place_of(__u32 svc_id, const struct svc_val *service,
					     __u32 slot, __u64 word)
{
	return (struct place){
		.svc = svc_id,
		.slot = slot,
		.cur = word & SLOT_BACKEND_MASK,
		.prev = word >> SLOT_BACKEND_BITS & SLOT_BACKEND_MASK,
		.state = word >> SLOT_STATE_SHIFT,
		.flags = service->flags,
		.idle_ns = service->idle_ns,
	};
}

static __always_inline bool find_place(const struct packet *pkt, __u32 svc_id,
				       const struct svc_val *service, struct place *p)
{
	__u32 slot;
	struct slot_val *s = find_slot(pkt, service, &slot);

	if (!s)
		return false;
	*p = place_of(svc_id, service, slot, READ_ONCE(s->word));
	return true;
}

static __always_inline bool is_settled(__u64 word)
{
	return word >> SLOT_STATE_SHIFT == SLOT_SETTLED;
}

static __always_inline enum mode shortcut_mode(__u64 shortcut)
{
	return shortcut >> SHORTCUT_MODE_SHIFT & 3;
}

/* The backend of a packet whose flow stands at its home and neither begins nor ends: the commonest on a
 * slot that is not settled. 0: track() has to look. */
static __always_inline __u32 under_way(const struct packet *pkt)
{
	struct flow_line *home = line_at(&flows, pkt->hash & config.flows_mask);
	__u64 word;

	if (unlikely(pkt->tcp_flags & (TCP_SYN | TCP_FIN | TCP_RST)) || !home)
		return 0;
	word = READ_ONCE(home->word);
	if (unlikely(!same_key(&home->key, &pkt->key)) || flow_state(word) != FLOW_CONFIRMED ||
	    older((now_ns() >> FLOW_TICK_SHIFT) - flow_seen(word), TOUCH_NS))
		return 0;
	/* As in flow_find(). */
	return (READ_ONCE(home->word) ^ word) & FLOW_BACKEND_MASK ? 0 : flow_backend(word);
}

/* The backend where a shortcut leads to the packet's slot, and the slot or a flow that is under way
 * says all; otherwise NULL. */
static __always_inline struct backend_val *backend_at_once(const struct packet *pkt, __u32 svc_id,
							   __u64 shortcut, __u32 *id)
{
	__u32 first = (__u32)(shortcut >> REGION_LOG2_BITS) &
		      ((1U << (SHORTCUT_MODE_SHIFT - REGION_LOG2_BITS)) - 1);
	__u32 log2 = shortcut & ((1 << REGION_LOG2_BITS) - 1), slot;
	struct backend_val *b;
	struct slot_val *s;
	__u64 word;

	if (unlikely(shortcut >> SHORTCUT_SVC_SHIFT != svc_id))
		return NULL;
	s = slot_of(pkt, first, log2, &slot);
	word = s ? READ_ONCE(s->word) : 0;
	if (!word)
		return NULL;
	/* Whoever explains a packet is shown all that choose() asks of a moving slot. */
	*id = is_settled(word) ? word & SLOT_BACKEND_MASK : DRY_RUN ? 0 : under_way(pkt);
	b = bpf_map_lookup_elem(&backends, id);
	if (unlikely(!b || !gets_packets(b->flags)))
		return NULL;
	step(STEP_SERVICE, shortcut_mode(shortcut), 0);
	step_slot(pkt, log2, slot, word);
	return b;
}

#endif
