/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * QUIC by connection id: a server writes its id into the connection ids that it gives out, so that a
 * connection's packets find it from whatever address they come (draft-ietf-quic-load-balancers; the
 * plaintext algorithm, since programs have no AES). What decides, in this order:
 *
 *   1. The server id of an id that a server made for certain: in short headers, and in Handshake
 *      packets of the versions known here. It is the connection's own word. What is remembered of the
 *      tuple may be another connection's, whose address the client has now.
 *   2. What is remembered of the tuple. The id of any other long header may be the client's random
 *      choice, and some of those look like a server's: such a packet stays with its flow.
 *   3. The server id there too, which the draft demands. Where the client chose it, all of its first
 *      flight has the same one, and that server is as good as any.
 *   4. The slot, as for every datagram.
 *
 * Nothing is learnt from an id, and a connection that ids lead needs no entry.
 */
#ifndef SHUNT_QUIC_H
#define SHUNT_QUIC_H

#include "flow.h"

#define QUIC_LONG 0x80
#define QUIC_V1	  0x00000001 /* RFC 9000 */
#define QUIC_V2	  0x6b3343cf /* RFC 9369, which numbers the types of packets anew */

#define QUIC_V1_HANDSHAKE 2
#define QUIC_V2_HANDSHAKE 3

/* Of a long header, to the first octet of its connection id; the shortest that is routable, with a
 * short header, is as long: flags, first octet, server id, and the least of nonces. */
#define QUIC_HEAD_BYTES 7

/* Only in a known version the first octet tells what kind of packet it is (RFC 8999). */
static __always_inline bool made_by_server(const __u8 *head)
{
	__u32 version = (__u32)head[1] << 24 | head[2] << 16 | head[3] << 8 | head[4];
	__u32 type = head[0] >> 4 & 3;

	if (!(head[0] & QUIC_LONG))
		return true;
	return (version == QUIC_V1 && type == QUIC_V1_HANDSHAKE) ||
	       (version == QUIC_V2 && type == QUIC_V2_HANDSHAKE);
}

/* Puts the server id of the packet's connection id into `key`; false if it has none. */
static __always_inline bool read_server_id(struct CONTEXT *ctx, __u32 at, __u32 left,
					   const struct svc_options *o, const __u8 *head,
					   struct server_id_key *key)
{
	bool long_header = head[0] & QUIC_LONG;
	__u32 before = long_header ? 6 : 1; /* the connection id */
	__u8 first = long_header ? head[6] : head[1];
	__u32 length = long_header ? head[5] : left - before;
	__u32 bytes = o->quic_id_bytes;

	if (first >> 5 != o->quic_config || length < 1 + bytes + o->quic_nonce_bytes ||
	    length > left - before)
		return false;
	/* 1 to 15, as the agent has it, and 6.1 is shown that: it learns nothing from `!= 0`
	 * ("R3 min value is outside of the allowed memory range"). */
	bytes = ((bytes - 1) & SERVER_ID_MAX) + 1;
	barrier_var(bytes);
	if (load_frame(ctx, at + before + 1, key->id, bytes))
		return false;
	key->id_bytes = o->quic_id_bytes;
	return true;
}

/* The backend with this server id; 0 = none. */
static __always_inline __u32 server_of(const struct server_id_key *key)
{
	struct server_id_val *v = bpf_map_lookup_elem(&server_ids, key);
	const __u64 *wanted = (const __u64 *)key->id, *found;
	__u64 word;

	if (!v)
		return 0;
	found = (const __u64 *)v->id;
	word = READ_ONCE(v->word);
	if (word >> 32 != key->svc || READ_ONCE(found[0]) != wanted[0] ||
	    READ_ONCE(found[1]) != wanted[1] || READ_ONCE(v->word) != word)
		return 0;
	return word;
}

static __always_inline enum event name_backend(struct CONTEXT *ctx, const struct packet *pkt,
					       struct place *p, struct nat_scratch *s)
{
	__u32 at = pkt->l4 + sizeof(struct udphdr), svc = p->svc;
	__u32 left = ETH_HLEN + pkt->ip_len - at, id;
	struct svc_options *o = bpf_map_lookup_elem(&svc_options, &svc);
	bool certain;
	__u8 flags;

	if (!o || left < QUIC_HEAD_BYTES || load_frame(ctx, at, s->quic, QUIC_HEAD_BYTES))
		return EVENT_QUIC_UNROUTABLE;
	certain = made_by_server(s->quic);
	s->server_id = (struct server_id_key){.svc = svc};
	id = read_server_id(ctx, at, left, o, s->quic, &s->server_id) ? server_of(&s->server_id) :
									0;
	flags = backend_flags(id);
	if (!(flags & BACKEND_KNOWN))
		return certain ? EVENT_QUIC_UNROUTABLE : EVENT_QUIC_FIRST;
	if (!(flags & BACKEND_UP))
		return EVENT_QUIC_DOWN;
	if (!certain && keeps_state(p) &&
	    peek_at(&pkt->key, pkt->hash, p->idle_ns + TOUCH_NS, p->cur))
		return EVENT_QUIC_FIRST;
	p->named = id;
	p->certain = certain;
	return EVENT_QUIC_BY_ID;
}

/* The backend that the packet's connection id names, in `p`. Not static: verified once. */
__noinline int find_by_id(struct CONTEXT *ctx, const struct packet *pkt, struct place *p)
{
	struct nat_scratch *s = own_scratch();

	if (!pkt || !p || !s)
		return 0;
	note(name_backend(ctx, pkt, p, s));
	return 0;
}

#endif
