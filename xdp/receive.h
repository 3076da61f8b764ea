/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What came through Geneve, on a backend: its way back is remembered, and it gets an address of the
 * backend's if it has none. */
#ifndef SHUNT_RECEIVE_H
#define SHUNT_RECEIVE_H

#include "inner.h"
#include "outer.h"

#define E2BIG  7
#define EEXIST 17

struct sweeping {
	__u64 now;
	__u32 left; /* of ended flows to be taken out */
	__u32 pad;
};

static long end_way(void *map, struct way_key *key, struct way_val *val, struct sweeping *s)
{
	if (!way_ended(val, key->proto, s->now))
		return 0;
	bpf_map_delete_elem(map, key);
	return !--s->left;
}

static __noinline void end_ways(struct sweeping *s)
{
	bpf_for_each_map_elem(&ways_back, end_way, s, 0);
}

/* When a look at all flows has last found fewer than sweep_enough that had ended. */
__u64 swept_ns;

/* A variable, since the verifier would count a constant down, state by state ("too complex"). */
__u32 sweep_enough = 2048;

/* Takes out enough for a while. A look at all of 262,144 flows takes some 20 ms (measured, two slow
 * processors), so a table full of live ones is looked at once a second. False: it was just now. */
static __noinline bool sweep(void)
{
	__u64 now = bpf_ktime_get_ns(), last = READ_ONCE(swept_ns);
	struct sweeping s = {.now = now, .left = READ_ONCE(sweep_enough)};

	if (now - last < S_TO_NS || __sync_val_compare_and_swap(&swept_ns, last, now) != last)
		return false;
	end_ways(&s);
	if (!s.left)
		WRITE_ONCE(swept_ns, last);
	return true;
}

static __always_inline bool leads_to(const struct way_val *val, const struct frontend *f)
{
	return same_address(val->vip, f->vip) && val->vip_port == f->port;
}

static __noinline enum decap_reason begin_way(const struct way_key *key, const struct frontend *f,
					      __u64 mode)
{
	struct way_val *val, fresh = {
				     .check = way_check(key),
				     .vip_port = f->port,
				     .outer_bytes = f->outer_bytes,
				     .seen_ns = bpf_ktime_get_ns(),
			     };
	int err; /* before 6.3 the upper half of what an update returns is not its sign */

	__builtin_memcpy(fresh.vip, f->vip, 16);
	err = bpf_map_update_elem(&ways_back, key, &fresh, mode);
	if (err == -E2BIG && sweep())
		err = bpf_map_update_elem(&ways_back, key, &fresh, mode);
	if (!err)
		return DECAP_UNWRAPPED;
	if (err != -EEXIST)
		return DECAP_DROP_FULL;
	val = bpf_map_lookup_elem(&ways_back, key); /* another processor was first */
	return val && leads_to(val, f) ? DECAP_UNWRAPPED : DECAP_DROP_CLASH;
}

/* A flow begins as if with a SYN, whatever its first packet says: anybody can make that up. */
static __noinline enum decap_reason remember_way(const struct inner *in, const struct frontend *f)
{
	const struct way_key *key = &in->key;
	struct way_val *val = find_way(key);
	__u32 flags;

	if (val && !(opens(in) && way_over(READ_ONCE(val->flags)))) {
		if (!leads_to(val, f))
			return DECAP_DROP_CLASH;
		flags = way_flags(in->tcp_flags, WAY_FIN_CLIENT);
		if (key->proto == IPPROTO_TCP && !(in->tcp_flags & TCP_SYN))
			flags |= WAY_OPEN;
		touch_way(val, key->proto, flags);
		return DECAP_UNWRAPPED;
	}
	/* Nothing is ever answered to an RST. */
	if (in->tcp_flags & TCP_RST)
		return DECAP_UNWRAPPED;
	return begin_way(key, f, bpf_map_lookup_elem(&ways_back, key) ? BPF_ANY : BPF_NOEXIST);
}

static __always_inline bool is_own(const __u8 *addr, bool ipv6)
{
	const volatile __u64 *own =
		(const volatile __u64 *)(ipv6 ? config.address6 : config.address4);
	const __u64 *half = (const __u64 *)addr;

	for (__u32 i = 0; i < DECAP_SOURCES && i < (ipv6 ? config.own6 : config.own4); i++) {
		if (half[0] == own[2 * i] && half[1] == own[2 * i + 1])
			return true;
	}
	return false;
}

/* The backend is of the other family: its first address of this one stands for the VIP. */
static __always_inline bool stand_in(__u8 *addr, bool ipv6)
{
	const volatile __u64 *own =
		(const volatile __u64 *)(ipv6 ? config.address6 : config.address4);
	__u64 *half = (__u64 *)addr;

	if (!(ipv6 ? config.own6 : config.own4))
		return false;
	half[0] = own[0];
	half[1] = own[1];
	return true;
}

/* The transport's checksum after a change of the sum that it is of. */
static __always_inline bool mend(struct xdp_md *ctx, const struct inner *in, __u32 offset,
				 __u64 change, bool may_be_none)
{
	__sum16 *check = at_most(ctx, in->l4 + offset, 2 * MAX_L4_OFFSET);

	if (!check || (void *)(check + 1) > end(ctx))
		return false;
	if (may_be_none && !*check)
		return true;
	swap_check(check, change);
	if (may_be_none && !*check)
		*check = 0xffff;
	return true;
}

/* The quoted packet's source, which is what this one was for. Returns what the error's sum changes by. */
static __always_inline __u64 quote_address(struct xdp_md *ctx, const struct inner *in,
					   const __u8 *addr)
{
	__u64 sum;

	if (in->ipv6) {
		struct ipv6hdr *ip = at_most(ctx, in->quoted, 2 * MAX_L4_OFFSET);

		if (!ip || (void *)(ip + 1) > end(ctx))
			return 0;
		sum = csum_sub(0, &ip->saddr, 4);
		__builtin_memcpy(&ip->saddr, addr, 16);
		return csum_add(sum, &ip->saddr, 4);
	} else {
		struct iphdr *ip = at_most(ctx, in->quoted, 2 * MAX_L4_OFFSET);

		if (!ip || (void *)(ip + 1) > end(ctx))
			return 0;
		sum = csum_sub(0, &ip->saddr, 1);
		ip->saddr = ipv4_of(addr);
		sum = csum_add(sum, &ip->saddr, 1);
		return sum + swap_check(&ip->check, sum);
	}
}

/* The destination, from the VIP to this host's own. */
static __noinline bool readdress(struct xdp_md *ctx, const struct inner *in, const __u8 *addr)
{
	__u64 sum, quote = in->quote ? quote_address(ctx, in, addr) : 0;

	if (in->ipv6) {
		struct ipv6hdr *ip = at(ctx, ETH_HLEN);

		if ((void *)(ip + 1) > end(ctx))
			return false;
		sum = csum_sub(0, &ip->daddr, 4);
		__builtin_memcpy(&ip->daddr, addr, 16);
		sum = csum_add(sum, &ip->daddr, 4);
	} else {
		struct iphdr *ip = at(ctx, ETH_HLEN);

		if ((void *)(ip + 1) > end(ctx))
			return false;
		sum = csum_sub(0, &ip->daddr, 1);
		ip->daddr = ipv4_of(addr);
		sum = csum_add(sum, &ip->daddr, 1);
		swap_check(&ip->check, sum);
	}
	if (in->rest)
		return true;
	if (in->quote) /* of IPv6 with the addresses, of IPv4 without */
		return mend(ctx, in, 2, quote + (in->ipv6 ? sum : 0), false);
	if (in->key.proto == IPPROTO_TCP)
		return mend(ctx, in, offsetof(struct tcphdr, check), sum, false);
	return mend(ctx, in, offsetof(struct udphdr, check), sum, true);
}

/* The packet stands in the frame without outer headers. */
static __always_inline enum decap_reason receive(struct xdp_md *ctx, const struct frontend *f)
{
	struct inner in = {};
	enum decap_reason why;
	bool stands_in;

	if (!read_inner(ctx, &in, false))
		return DECAP_DROP_PROTOCOL;
	stands_in = same_address(in.key.addr, f->vip);
	if (stands_in ? !stand_in(in.key.addr, in.ipv6) : !is_own(in.key.addr, in.ipv6))
		return DECAP_DROP_ADDRESS;
	if (!in.rest && !in.quote) {
		why = remember_way(&in, f);
		if (why != DECAP_UNWRAPPED)
			return why;
	}
	return !stands_in || readdress(ctx, &in, in.key.addr) ? DECAP_UNWRAPPED :
								DECAP_DROP_PROTOCOL;
}

/* A bare packet in the tuple of a flow that came through Geneve: its answers would seem the VIP's. */
static __always_inline bool clashes(struct xdp_md *ctx)
{
	struct inner in = {};

	return opens_geneve() && read_inner(ctx, &in, false) && !in.rest && !in.quote &&
	       (opens(&in) || in.key.proto == IPPROTO_UDP) && is_own(in.key.addr, in.ipv6) &&
	       find_way(&in.key);
}

/* A VIP that is tunneled without being readdressed: its SYN-ACKs have to leave room. */
static __always_inline void note_tunneled(struct xdp_md *ctx, __u32 outer_bytes)
{
	struct tunneled_val *known, fresh = {.outer_bytes = outer_bytes};
	struct inner in = {};
	struct tunneled_key key;

	if (!read_inner(ctx, &in, false) || !opens(&in))
		return;
	__builtin_memcpy(key.vip, in.key.addr, 16);
	known = bpf_map_lookup_elem(&tunneled, &key);
	if (!known || known->outer_bytes < outer_bytes)
		bpf_map_update_elem(&tunneled, &key, &fresh, BPF_ANY);
}

#endif
