/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Mode nat, and hairpins: translated packets are handed to the device that leads to the backend, or
 * back to the client. The stack would not route them: their source is an address of this host, or a
 * VIP.
 */
#ifndef SHUNT_SEND_ON_H
#define SHUNT_SEND_ON_H

#include "change.h"
#include "nat_pair.h"

/* A packet that the program sends is whole: at its device's egress there is nothing left to do. Until then the
 * kernel keeps this beside it (tc_index); nothing on a wire can say so. */
#define SENT_BY_US 0x5348

/* How the client's packets came. Tagged frames do not come this far. */
static __always_inline bool way_back(struct __sk_buff *ctx, struct last_hop *back)
{
	struct ethhdr *eth = at(ctx, 0);

	if ((void *)(eth + 1) > end(ctx))
		return false;
	__builtin_memcpy(back->peer, eth->h_source, ETH_ALEN);
	__builtin_memcpy(back->own, eth->h_dest, ETH_ALEN);
	back->ifindex = ctx->ifindex;
	return true;
}

/* Whether what goes on the wire fits: a packet of many segments is cut up on the way out. */
static __always_inline bool fits(struct __sk_buff *ctx, const struct packet *pkt, __u32 mtu,
				 __u32 ifindex)
{
	__u32 headers = pkt->l4 - ETH_HLEN, any = 0;
	struct tcphdr *tcp;

	if (pkt->ip_len <= mtu)
		return true;
	if (!ctx->gso_size)
		return false;
	/* Several of SCTP are no segments of one size: each is as long as it is. */
	if (pkt->key.proto == IPPROTO_SCTP)
		return !bpf_check_mtu(ctx, ifindex, &any, 0, BPF_MTU_CHK_SEGS);
	tcp = transport(ctx, pkt);
	if (!tcp || (void *)(tcp + 1) > end(ctx))
		return false;
	headers += pkt->key.proto == IPPROTO_TCP ? tcp->doff * 4U : sizeof(struct udphdr);
	return ctx->gso_size + headers <= mtu;
}

static __always_inline bool push_tags(struct __sk_buff *ctx, __u32 tags)
{
	__u32 outer = tags >> 16, inner = tags & 0xffff;

	/* Bit 12 of a tag in the tables: 802.1ad (bpf/vlan.h). */
	if (inner && bpf_skb_vlan_push(ctx, bpf_htons(inner & 0x1000 ? ETH_P_8021AD : ETH_P_8021Q),
				       inner & 0x0fff))
		return false;
	return !outer ||
	       !bpf_skb_vlan_push(ctx, bpf_htons(outer & 0x1000 ? ETH_P_8021AD : ETH_P_8021Q),
				  outer & 0x0fff);
}

static __always_inline bool write_ends(struct __sk_buff *ctx, const __u8 *to, const __u8 *from)
{
	struct ethhdr *eth = at(ctx, 0);

	if ((void *)(eth + 1) > end(ctx))
		return false;
	__builtin_memcpy(eth->h_dest, to, ETH_ALEN);
	__builtin_memcpy(eth->h_source, from, ETH_ALEN);
	return true;
}

/* The neighbour is not known (yet): the kernel asks. */
static __always_inline int redirect_unresolved(struct __sk_buff *ctx, const struct nexthop_val *nh)
{
	bool ipv6 = !is_mapped(nh->addr);
	struct bpf_redir_neigh to = {.nh_family = ipv6 ? AF_INET6 : AF_INET};

	if (ipv6)
		__builtin_memcpy(to.ipv6_nh, nh->addr, 16);
	else
		to.ipv4_nh = ipv4_of(nh->addr);
	ctx->tc_index = SENT_BY_US;
	return bpf_redirect_neigh(nh->ifindex, &to, sizeof(to), 0);
}

/* Whether the device is a veth whose other end, in another namespace, may be handed packets. */
static __always_inline bool has_other_end(__u32 ifindex)
{
	__u32 index = ifindex % VETH_SETS;
	struct veth_set *set = bpf_map_lookup_elem(&veth_sets, &index);

	for (int i = 0; set && i < VETH_WAYS; i++)
		if (READ_ONCE(set->ifindex[i]) == ifindex)
			return true;
	return false;
}

/* Out of a device; or, where the node says so, straight to a veth's other end, as if it had come in there by
 * the wire: past the queues, and what others have attached. The kernel does that at ingress alone. */
static __always_inline int hand_over(struct __sk_buff *ctx, const struct packet *pkt, __u32 ifindex)
{
	if (config.handover_peer && pkt->way == WAY_TC_IN && !ctx->vlan_present &&
	    has_other_end(ifindex))
		return bpf_redirect_peer(ifindex, 0);
	ctx->tc_index = SENT_BY_US;
	return bpf_redirect(ifindex, 0);
}

/* Mode local, too, where the node says so and the backend's neighbour is known. What is no plain packet of TCP
 * or UDP goes by the stack. */
static __always_inline bool may_hand_over(const struct packet *pkt, const struct nexthop_val *nh)
{
	__u64 word;

	if (!config.handover_peer || pkt->way != WAY_TC_IN || pkt->first ||
	    (pkt->key.proto != IPPROTO_TCP && pkt->key.proto != IPPROTO_UDP))
		return false;
	word = READ_ONCE(*(__u64 *)nh); /* MAC and MTU. Little-endian. */
	return word << 16 && !nh->tags && has_other_end(nh->ifindex);
}

/* How a packet to this backend is sent: MODE_LOCAL, by the stack; else by the program. */
static __always_inline __u32 way_of_sending(const struct packet *pkt, __u32 mode, __u32 id)
{
	struct backend_val *b;
	struct nexthop_val *nh;
	__u32 index;

	if (!config.handover_peer || mode != MODE_LOCAL)
		return mode;
	b = bpf_map_lookup_elem(&backends, &id);
	index = b ? b->nexthop : 0;
	nh = index ? bpf_map_lookup_elem(&nexthops, &index) : NULL;
	return nh && may_hand_over(pkt, nh) ? MODE_NAT : mode;
}

static __always_inline struct verdict redirected(int action, enum reason reason)
{
	if (action != TC_ACT_REDIRECT)
		return verdict(XDP_DROP, REASON_DROP_NO_NEXTHOP);
	return verdict(action, reason);
}

/* Mode local: into the stack, or (a reply) on its way out. */
static __always_inline struct verdict pass_on(struct __sk_buff *ctx, const struct packet *pkt,
					      const struct flow_key *to)
{
	if (!change(ctx, pkt, to))
		return verdict(XDP_DROP, REASON_DROP_BAD_TABLE);
	return verdict(XDP_PASS, REASON_SENT_TO_BACKEND);
}

static __always_inline struct verdict send_to_backend(struct __sk_buff *ctx,
						      const struct packet *pkt, __u32 id,
						      const struct flow_key *to)
{
	struct backend_val *b = bpf_map_lookup_elem(&backends, &id);
	__u32 index = b ? b->nexthop : 0;
	struct nexthop_val *nh = bpf_map_lookup_elem(&nexthops, &index);
	__u64 word = nh ? READ_ONCE(*(__u64 *)nh) : 0; /* MAC and MTU. Little-endian. */

	step(STEP_BACKEND, id, b ? b->flags : 0);
	if (nh) {
		step(STEP_HOP, nh->ifindex, word >> 48 | (__u64)nh->tags << 32);
		step(STEP_HOP_MAC, 0, word << 16 >> 16);
	}
	if (crosses(pkt, to)) /* a flow that XDP made, before */
		return verdict(XDP_DROP, REASON_DROP_NAT46_NOT_XDP);
	if (!nh || !nh->ifindex || (!(word << 16) && nh->tags))
		return verdict(XDP_DROP, REASON_DROP_NO_NEXTHOP);
	if (!fits(ctx, pkt, word >> 48, nh->ifindex))
		return too_big(ctx, pkt, word >> 48);
	if (!decrement_ttl(ctx, pkt->ipv6))
		return verdict(XDP_DROP, REASON_DROP_TTL_EXPIRED);
	if (!change(ctx, pkt, to))
		return verdict(XDP_DROP, REASON_DROP_BAD_TABLE);
	if (!(word << 16))
		return redirected(redirect_unresolved(ctx, nh), REASON_SENT_TO_BACKEND);
	if (!write_ends(ctx, (__u8 *)&word, nh->smac) || !push_tags(ctx, nh->tags))
		return verdict(XDP_DROP, REASON_DROP_BAD_TABLE);
	return redirected(hand_over(ctx, pkt, nh->ifindex), REASON_SENT_TO_BACKEND);
}

static __always_inline struct verdict send_back(struct __sk_buff *ctx, const struct packet *pkt,
						const struct last_hop *back,
						const struct flow_key *to)
{
	__u32 mtu = 0;

	/* Most of TCP's packets without data fit anywhere. */
	if (pkt->ip_len > (pkt->ipv6 ? IPV6_MTU_MIN : IPV4_MTU_MIN) &&
	    bpf_check_mtu(ctx, back->ifindex, &mtu, 0, BPF_MTU_CHK_SEGS) > 0)
		return too_big(ctx, pkt, mtu);
	if (!decrement_ttl(ctx, pkt->ipv6))
		return verdict(XDP_DROP, REASON_DROP_TTL_EXPIRED);
	if (!change(ctx, pkt, to))
		return verdict(XDP_DROP, REASON_DROP_BAD_TABLE);
	if (!write_ends(ctx, back->peer, back->own) || !push_tags(ctx, back->tags))
		return verdict(XDP_DROP, REASON_DROP_BAD_TABLE);
	return redirected(hand_over(ctx, pkt, back->ifindex), REASON_SENT_TO_CLIENT);
}

/* A packet of a client's. A backend that is its own client gets it back as the VIP's: no stack takes
 * from outside what it has sent itself. The answer to the VIP then comes by here, too. */
static __always_inline struct verdict send_forward(struct __sk_buff *ctx, const struct packet *pkt,
						   struct nat_scratch *s, __u32 backend,
						   const struct flow_key *to)
{
	struct verdict v;

	if (s->mode == MODE_NAT)
		return send_to_backend(ctx, pkt, backend, to);
	if (same_address(to->saddr, pkt->key.saddr))
		return pass_on(ctx, pkt, to);
	if (!way_back(ctx, &s->back))
		return verdict(XDP_DROP, REASON_DROP_BAD_TABLE);
	v = send_back(ctx, pkt, &s->back, to);
	if (v.reason == REASON_SENT_TO_CLIENT)
		v.reason = REASON_SENT_TO_BACKEND;
	return v;
}

#endif
