/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What a backend sends, beside xdp/decap.bpf.c, as it leaves by the same device:
 *
 *   flows that came through Geneve   own address and port   becomes   the VIP's
 *   SYN-ACKs of tunneled flows       the MSS leaves room for the outer headers of what the client
 *                                    sends: with direct server return no other host sees them
 *
 * Later fragments follow their first one, and ICMP errors the flow that they quote.
 */
#define CONTEXT __sk_buff

#include <linux/pkt_cls.h>

#include "checksum.h"
#include "inner.h"
#include "mss.h"

#define HEADER_BYTES 128
#define ICMP_CHECK   2

/* LRU: a datagram is worth remembering for as long as its fragments take to leave. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct answer_key);
	__type(value, struct answer_val);
} answers SEC(".maps");

/* What the sum of a packet with this source changes by when it has that one. */
static __always_inline __u64 source_change(const __u8 *from, const __u8 *to)
{
	return fold32(
		csum_add(csum_sub(0, from, 4), to, 4)); /* of IPv4 the mapped prefixes cancel */
}

/* The IP header's source. */
static __noinline bool write_source(struct __sk_buff *ctx, const struct inner *in, const __u8 *vip,
				    __u64 change)
{
	__u32 check = ETH_HLEN + offsetof(struct iphdr, check);

	if (in->ipv6)
		return !bpf_skb_store_bytes(ctx, ETH_HLEN + offsetof(struct ipv6hdr, saddr), vip,
					    16, 0);
	return !bpf_l3_csum_replace(ctx, check, 0, change, 0) &&
	       !bpf_skb_store_bytes(ctx, ETH_HLEN + offsetof(struct iphdr, saddr), vip + 12, 4, 0);
}

static __noinline bool write_port(struct __sk_buff *ctx, const struct inner *in, __u64 change,
				  __be16 port)
{
	bool udp = in->key.proto == IPPROTO_UDP;
	__u32 check =
		in->l4 + (udp ? offsetof(struct udphdr, check) : offsetof(struct tcphdr, check));
	__u64 mangled = udp ? BPF_F_MARK_MANGLED_0 : 0;

	if (bpf_l4_csum_replace(ctx, check, 0, change, BPF_F_PSEUDO_HDR | mangled) ||
	    bpf_l4_csum_replace(ctx, check, in->key.port, port, sizeof(port) | mangled))
		return false;
	/* As in tc/change.h: a device's sum of the whole packet stays as it is with IPv6. */
	if (in->ipv6)
		bpf_csum_update(ctx, change);
	return !bpf_skb_store_bytes(ctx, in->l4, &port, sizeof(port), 0);
}

static __always_inline bool is_syn_ack(const struct inner *in)
{
	const __u8 both = TCP_SYN | TCP_ACK;

	return in->key.proto == IPPROTO_TCP && !in->rest && !in->quote &&
	       (in->tcp_flags & (both | TCP_RST)) == both;
}

static __always_inline void answer_key_of(const struct inner *in, struct answer_key *key)
{
	__builtin_memcpy(key->saddr, in->key.addr, 16);
	__builtin_memcpy(key->daddr, in->key.client, 16);
	key->id = in->id;
	key->proto = in->ipv6 ? 0 : in->key.proto;
}

/* A fragment without ports. */
static __noinline int answer_rest(struct __sk_buff *ctx, const struct inner *in)
{
	struct answer_val *val;
	struct answer_key key;
	__u64 change;

	answer_key_of(in, &key);
	val = bpf_map_lookup_elem(&answers, &key);
	if (!val)
		return -1;
	change = source_change(in->key.addr, val->vip);
	/* Where a device has summed it up, that sum changes with addresses that have none of their own. */
	if (in->ipv6)
		bpf_csum_update(ctx, change);
	return write_source(ctx, in, val->vip, change) ? DECAP_ANSWERED : DECAP_DROP_ANSWER;
}

/* The quoted packet's destination, and the error's source if it is the same: this host tells of what it
 * got itself. */
static __noinline bool answer_quote(struct __sk_buff *ctx, const struct inner *in,
				    const struct way_val *way)
{
	__u32 check = in->l4 + ICMP_CHECK, at_addr = in->quoted, at_port = in->ports + 2;
	__u64 change = source_change(in->key.addr, way->vip), sum = 0;
	__be16 port = way->vip_port;
	__u8 own[16] = {};

	if (in->ipv6) {
		if (bpf_skb_load_bytes(ctx, ETH_HLEN + offsetof(struct ipv6hdr, saddr), own, 16))
			return false;
		at_addr += offsetof(struct ipv6hdr, daddr);
		sum = change;
		if (bpf_skb_store_bytes(ctx, at_addr, way->vip, 16, 0))
			return false;
	} else {
		__be32 addr;

		if (bpf_skb_load_bytes(ctx, ETH_HLEN + offsetof(struct iphdr, saddr), &addr, 4))
			return false;
		map_ipv4(own, addr);
		/* The quoted header's own checksum takes up its change. */
		if (bpf_l3_csum_replace(ctx, at_addr + offsetof(struct iphdr, check), 0, change, 0))
			return false;
		at_addr += offsetof(struct iphdr, daddr);
		if (bpf_skb_store_bytes(ctx, at_addr, way->vip + 12, 4, 0))
			return false;
	}
	if (bpf_skb_store_bytes(ctx, at_port, &port, sizeof(port), 0))
		return false;
	sum += (__u64)(__u16)~in->key.port + port;
	if (same_address(own, in->key.addr)) {
		if (in->ipv6)
			sum += change; /* once more, in the pseudo-header */
		if (!write_source(ctx, in, way->vip, change))
			return false;
	}
	return !bpf_l4_csum_replace(ctx, check, 0, fold32(sum), 0);
}

/* The packet is of a flow that came through Geneve. */
static __noinline int answer_flow(struct __sk_buff *ctx, const struct inner *in,
				  struct way_val *val)
{
	struct way_val way = {
		.check = READ_ONCE(val->check),
		.vip_port = val->vip_port,
		.outer_bytes = val->outer_bytes,
	};
	__u64 change;

	__builtin_memcpy(way.vip, val->vip, 16);
	if (way.check != way_check(&in->key) || READ_ONCE(val->check) != way.check)
		return -1; /* recycled under us: its flow is over */
	if (in->quote)
		return answer_quote(ctx, in, &way) ? DECAP_ANSWERED : DECAP_DROP_ANSWER;
	if (in->first) {
		struct answer_val rest;
		struct answer_key key;

		answer_key_of(in, &key);
		__builtin_memcpy(rest.vip, way.vip, 16);
		if (bpf_map_update_elem(&answers, &key, &rest, BPF_ANY))
			return DECAP_DROP_ANSWER;
	}
	touch_way(val, in->key.proto, way_flags(in->tcp_flags, WAY_FIN_BACKEND));
	change = source_change(in->key.addr, way.vip);
	if (!write_port(ctx, in, change, way.vip_port) || !write_source(ctx, in, way.vip, change))
		return DECAP_DROP_ANSWER;
	if (is_syn_ack(in) && clamp(ctx, in, way.outer_bytes))
		count(&decap_reasons, DECAP_CLAMPED, ctx->len);
	return DECAP_ANSWERED;
}

/* What became of it; -1: it leaves as it is. */
static __always_inline int answer(struct __sk_buff *ctx)
{
	struct tunneled_val *around;
	struct tunneled_key vip;
	struct inner in = {};
	struct way_val *val;

	if (!read_inner(ctx, &in, true))
		return -1;
	if (in.rest)
		return answer_rest(ctx, &in);
	val = find_way(&in.key);
	if (val)
		return answer_flow(ctx, &in, val);
	if (!is_syn_ack(&in))
		return -1;
	__builtin_memcpy(vip.vip, in.key.addr, 16);
	around = bpf_map_lookup_elem(&tunneled, &vip);
	return around && clamp(ctx, &in, around->outer_bytes) ? DECAP_CLAMPED : -1;
}

/* The one exit. TC_ACT_UNSPEC, which is TCX_NEXT, lets other programs see the packet. */
SEC("tc")
int shunt_answer(struct __sk_buff *ctx)
{
	__u32 len = ctx->len;
	int what;

	pull(ctx, HEADER_BYTES);
	what = answer(ctx);
	if (what < 0)
		return TC_ACT_UNSPEC;
	count(&decap_reasons, what, len);
	return what == DECAP_DROP_ANSWER ? TC_ACT_SHOT : TC_ACT_UNSPEC;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
