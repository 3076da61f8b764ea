/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What a service may ask for beyond balancing. None of it runs for one that asks for nothing. */
#ifndef SHUNT_OPTIONS_H
#define SHUNT_OPTIONS_H

#include "flow.h"
#include "sources.h"

/* The generic cell rate algorithm (ITU-T I.371): one word says how far ahead a network is. */
static __always_inline bool within_rate(const struct packet *pkt, __u32 svc,
					const struct svc_options *o)
{
	const __u64 *mask = (const __u64 *)(pkt->ipv6 ? o->rate_mask6 : o->rate_mask4);
	const __u64 *from = (const __u64 *)pkt->key.saddr;
	__u64 now = config.test_clock ? now_ns() : bpf_ktime_get_ns(), due;
	struct rate_val first = {.due_ns = now + o->rate_gap_ns}, *rate;
	struct rate_key key __attribute__((aligned(8))) = {.svc = svc};
	__u64 *to = (__u64 *)key.network;

	to[0] = from[0] & mask[0];
	to[1] = from[1] & mask[1];
	rate = bpf_map_lookup_elem(&rates, &key);
	step(STEP_RATE, !rate || (__s64)(rate->due_ns - now) <= (__s64)o->rate_burst_ns, 0);
	if (!rate) {
		if (!DRY_RUN)
			bpf_map_update_elem(&rates, &key, &first, BPF_NOEXIST);
		return true;
	}
	due = READ_ONCE(rate->due_ns);
	if ((__s64)(due - now) > (__s64)o->rate_burst_ns)
		return false;
	if ((__s64)(due - now) < 0)
		due = now;
	/* Two at once on two processors count as one: no reason to refuse either. */
	if (!DRY_RUN)
		WRITE_ONCE(rate->due_ns, due + o->rate_gap_ns);
	return true;
}

static __always_inline void hash_by_client(struct packet *pkt)
{
	const __u32 own = (1U << HASH_OWN_BITS) - 1;

	pkt->hash = (client_hash(&pkt->key, 0) & ~own) | (pkt->hash & own);
}

/* Whether the packet may go on; otherwise `*why` says why not. May change the packet's hash. */
static __noinline bool apply_options(struct packet *pkt, __u32 svc, __u32 flags, enum reason *why)
{
	struct svc_options *o = bpf_map_lookup_elem(&svc_options, &svc);

	*why = REASON_DROP_BAD_TABLE;
	if (!o)
		return false;
	*why = REASON_DROP_SOURCE_DENIED;
	if (flags & SVC_SOURCES && !source_allowed(pkt->key.saddr, READ_ONCE(o->sources)))
		return false;
	*why = REASON_DROP_RATE_LIMITED;
	if (flags & SVC_RATE && opens(pkt) && !within_rate(pkt, svc, o))
		return false;
	if (flags & SVC_HASH_CLIENT)
		hash_by_client(pkt);
	return true;
}

#endif
