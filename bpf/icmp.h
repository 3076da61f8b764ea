/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * ICMP for a VIP: echo requests are answered; errors go to whoever sent the packet that they quote.
 *
 * The quoted packet went from the VIP to a client (or, translated, from this host to a backend), so
 * its tuple is reversed and looked up like a packet's. Nothing is learnt from it: anybody can make one
 * up.
 */
#ifndef SHUNT_ICMP_H
#define SHUNT_ICMP_H

#include "echo.h"
#include "options.h"
#include "rewrite.h"
#include "select.h"

static __always_inline bool is_icmp(const struct packet *pkt)
{
	return pkt->key.proto == (pkt->ipv6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP);
}

/* Errors about a packet; a redirect is none. */
static __always_inline bool is_error(__u8 type, bool ipv6)
{
	if (ipv6)
		return type >= ICMPV6_UNREACHABLE && type <= ICMPV6_BAD_HEADER;
	return type == ICMP_UNREACHABLE || type == ICMP_TIME_EXCEEDED || type == ICMP_BAD_HEADER;
}

static __always_inline bool same_ipv6(const struct in6_addr *in_frame, const __u8 *addr)
{
	const __u32 *a = (const __u32 *)in_frame, *b = (const __u32 *)addr;

	return a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3];
}

/* If the quote has ports that may concern us, the packet has its tuple from now on, reversed. */
static __always_inline void read_quote(struct CONTEXT *ctx, struct packet *pkt)
{
	__u32 l4 = pkt->l4, inner = l4 + sizeof(struct icmp_error), ports;
	__be16 *port;
	__u8 proto;

	if (l4 > MAX_L4_OFFSET)
		return;
	if (pkt->ipv6) {
		struct ipv6hdr *ip = at(ctx, inner);

		if ((void *)(ip + 1) > end(ctx) || ip->version != 6 ||
		    !same_ipv6(&ip->saddr, pkt->key.daddr))
			return;
		proto = ip->nexthdr;
		ports = inner + sizeof(*ip);
		if (proto == NEXTHDR_FRAGMENT) {
			__be16 *fragment = (void *)(ip + 1);

			if ((void *)(fragment + 4) > end(ctx) ||
			    fragment[1] & bpf_htons(IPV6_OFFSET))
				return;
			proto = *(__u8 *)fragment;
			ports += 8;
		}
		__builtin_memcpy(pkt->key.saddr, &ip->daddr, 16);
	} else {
		struct iphdr *ip = at(ctx, inner);

		if ((void *)(ip + 1) > end(ctx) || ip->version != 4 || ip->ihl < 5 ||
		    ip->saddr != ipv4_of(pkt->key.daddr) || ip->frag_off & bpf_htons(IP_OFFSET))
			return;
		proto = ip->protocol;
		ports = inner + ip->ihl * 4;
		map_ipv4(pkt->key.saddr, ip->daddr);
	}
	port = at(ctx, ports);
	if ((void *)port + 8 > end(ctx) || ports + 8 > ETH_HLEN + pkt->ip_len)
		return;
	if (has_ports(proto))
		set_ports(&pkt->key, port[1], port[0], proto);
	else if (AT_TC && proto == pkt->key.proto && is_echo_request(port[0], pkt->ipv6))
		set_ports(&pkt->key, 0, port[ECHO_ID], proto);
	else
		return;
	pkt->frontend = frontend_hash(&pkt->key, pkt->ipv6, dport_proto_scope(&pkt->key));
	pkt->hash = flow_hash(&pkt->key, pkt->ipv6, pkt->frontend);
	pkt->quoted_ports = ports;
	pkt->quote = true;
}

/* The owner of an established flow, where the slot alone does not say: as track() finds it. */
static __always_inline __u32 peek(const struct packet *pkt, const struct place *p,
				  struct nat_scratch *s)
{
	__u32 id = peek_at(&pkt->key, pkt->hash, p->idle_ns + TOUCH_NS, p->cur);

	if (!id && p->flags & SVC_AFFINITY) {
		struct svc_options *o = bpf_map_lookup_elem(&svc_options, &s->svc);

		client_key(pkt, s->svc, &s->key);
		if (o)
			id = peek_at(&s->key, client_hash(&pkt->key, s->svc), o->affinity_ns, 0);
	}
	if (id)
		return id;
	return p->state == SLOT_MOVING && is_up(p->prev) ? p->prev : p->cur;
}

/* Which flow it is that the quote tells of, and to whom it goes. */
__noinline __u64 look_quote(struct packet *pkt)
{
	struct nat_scratch *s = own_scratch();
	struct svc_val *service;
	struct place p = {};

	if (!pkt || !s)
		return LOOK_NOTHING;
	if (pkt->way == WAY_TC_OUT)
		return is_port_of_ours(pkt->key.proto, bpf_ntohs(pkt->key.sport)) &&
				       look_reverse(pkt, s) ?
			       LOOK_FOUND :
			       LOOK_NOTHING;
	if (!may_be_ours(&pkt->key))
		return LOOK_NOTHING;
	if (may_be_reply(&pkt->key) && look_reverse(pkt, s))
		return LOOK_FOUND;
	s->svc = find_service(pkt);
	service = bpf_map_lookup_elem(&svc, &s->svc);
	if (!s->svc || !service)
		return LOOK_NOTHING;
	s->mode = service->mode;
	if (AT_TC ? s->mode != MODE_LOCAL && s->mode != MODE_NAT : s->mode == MODE_LOCAL)
		return LOOK_NOTHING;
	if (service->flags & SVC_HASH_CLIENT)
		hash_by_client(pkt);
	if (AT_TC || s->mode == MODE_NAT)
		return look_forward(pkt, s) ? LOOK_FOUND :
					      word_of(verdict(XDP_DROP, REASON_DROP_NAT_NO_FLOW));
	if (s->mode == MODE_NONE || !find_place(pkt, s->svc, service, &p))
		return word_of(verdict(XDP_DROP, REASON_DROP_BAD_TABLE));
	s->backend = keeps_state(&p) ? peek(pkt, &p, s) : p.cur;
	return s->backend ? LOOK_FOUND : word_of(verdict(XDP_DROP, REASON_DROP_NO_BACKEND));
}

#define NO_ROOM (~0ULL) /* no sum is so large */

/* The quoted packet's addresses become those of `to`, reversed: it went the other way. The error's
 * own go with them: to who sent what is quoted; and from the other end, if that has changed. Returns
 * what its checksum changes by. */
static __noinline __u64 quote_addresses(struct CONTEXT *ctx, const struct packet *pkt,
					const struct flow_key *to)
{
	__u32 l4 = pkt->l4, inner = l4 + sizeof(struct icmp_error);
	bool hide = !same_address(to->saddr, pkt->key.saddr);
	__u64 sum;

	if (l4 > MAX_L4_OFFSET)
		return NO_ROOM;
	if (pkt->ipv6) {
		struct ipv6hdr *ip = at(ctx, ETH_HLEN), *in = at(ctx, inner);

		if ((void *)(ip + 1) > end(ctx) || (void *)(in + 1) > end(ctx))
			return NO_ROOM;
		sum = csum_sub(csum_sub(0, &ip->saddr, 8), &in->saddr, 8);
		if (hide)
			__builtin_memcpy(&ip->saddr, to->saddr, 16);
		__builtin_memcpy(&ip->daddr, to->daddr, 16);
		__builtin_memcpy(&in->saddr, to->daddr, 16);
		__builtin_memcpy(&in->daddr, to->saddr, 16);
		return csum_add(csum_add(sum, &ip->saddr, 8), &in->saddr, 8);
	} else {
		struct iphdr *ip = at(ctx, ETH_HLEN), *in = at(ctx, inner);

		if ((void *)(ip + 1) > end(ctx) || (void *)(in + 1) > end(ctx))
			return NO_ROOM;
		sum = csum_sub(0, &ip->saddr, 2);
		if (hide)
			ip->saddr = ipv4_of(to->saddr);
		ip->daddr = ipv4_of(to->daddr);
		ip->check = csum_fold((__u64)(__u16)~ip->check + csum_add(sum, &ip->saddr, 2));
		sum = csum_sub(0, &in->saddr, 2);
		in->saddr = ipv4_of(to->daddr);
		in->daddr = ipv4_of(to->saddr);
		sum = csum_add(sum, &in->saddr, 2);
		return sum + swap_check(&in->check, sum);
	}
}

/* An error's addresses and its quote, translated. 0, or a verdict's word. */
__noinline __u64 rewrite_quote(struct CONTEXT *ctx, const struct packet *pkt)
{
	const __u64 broken = word_of(verdict(XDP_DROP, REASON_DROP_BAD_TABLE));
	struct nat_scratch *s = own_scratch();
	struct icmp_error *icmp;
	__u32 l4, ports;
	__u64 sum, all;
	__be16 *port;

	if (!pkt || !s)
		return broken;
	l4 = pkt->l4;
	ports = pkt->quoted_ports;
	sum = quote_addresses(ctx, pkt, &s->to);
	if (l4 > MAX_L4_OFFSET || ports > 2 * MAX_L4_OFFSET || sum == NO_ROOM)
		return broken;
	port = at(ctx, ports);
	if ((void *)(port + 4) > end(ctx))
		return broken;
	if (AT_TC && is_icmp(pkt)) {
		all = (__u64)(__u16)~port[ECHO_ID] + s->to.dport;
		port[ECHO_ID] = s->to.dport;
	} else {
		all = (__u64)(__u16)~port[0] + (__u16)~port[1] + s->to.sport + s->to.dport;
		port[0] = s->to.dport;
		port[1] = s->to.sport;
	}
	sum += all;
	if (!AT_TC || pkt->key.proto != IPPROTO_ICMP) /* which has no pseudo-header */
		all += address_change(pkt, &s->to);
	/* TCP's checksum is beyond the eight bytes that every quote has. */
	if (pkt->key.proto == IPPROTO_TCP) {
		if (ports + 18 <= ETH_HLEN + pkt->ip_len && (void *)(port + 9) <= end(ctx))
			sum += swap_check(&port[8], all);
	} else if (pkt->key.proto == IPPROTO_UDP && port[3]) {
		sum += swap_check(&port[3], all);
	} else if (AT_TC && is_icmp(pkt)) {
		sum += swap_check(&port[1], all);
	}
	/* Once more: 6.1 knows no bound of the copy that clang 14 has kept ("R2 offset is outside of
	 * the packet"). */
	barrier_var(l4);
	if (l4 > MAX_L4_OFFSET)
		return broken;
	icmp = at(ctx, l4);
	if ((void *)(icmp + 1) > end(ctx))
		return broken;
	icmp->checksum = csum_fold((__u64)(__u16)~icmp->checksum + sum);
	return 0;
}

/* An echo request is answered, which ends in a verdict; an error's quote is read. */
__noinline __u64 look_icmp(struct CONTEXT *ctx, struct packet *pkt)
{
	struct icmp_error *icmp;
	__u32 l4;

	if (!pkt)
		return 0;
	l4 = pkt->l4;
	if (l4 > MAX_L4_OFFSET || pkt->first)
		return 0;
	icmp = at(ctx, l4);
	if ((void *)(icmp + 1) > end(ctx) || !fits_frame(ctx, pkt))
		return 0;
	if (pkt->way != WAY_TC_OUT && is_echo_request(*(__be16 *)icmp, pkt->ipv6))
		return answer_echo(ctx, pkt);
	if (is_error(icmp->type, pkt->ipv6))
		read_quote(ctx, pkt);
	return 0;
}

#endif
