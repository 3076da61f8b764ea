/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* A keyed hash of a tuple: where the search for a port begins. */
#ifndef SHUNT_SIPHASH_H
#define SHUNT_SIPHASH_H

#include "verdict.h"

#define ROTL(x, b) ((x) << (b) | (x) >> (64 - (b)))

struct sip {
	__u64 v0, v1, v2, v3;
};

static __always_inline void sip_round(struct sip *s)
{
	s->v0 += s->v1;
	s->v1 = ROTL(s->v1, 13) ^ s->v0;
	s->v0 = ROTL(s->v0, 32);
	s->v2 += s->v3;
	s->v3 = ROTL(s->v3, 16) ^ s->v2;
	s->v0 += s->v3;
	s->v3 = ROTL(s->v3, 21) ^ s->v0;
	s->v2 += s->v1;
	s->v1 = ROTL(s->v1, 17) ^ s->v2;
	s->v2 = ROTL(s->v2, 32);
}

/* SipHash-1-3 (Aumasson and Bernstein, 2012) of the tuple and the attempt: an outsider who
 * sees some ports cannot tell the next one. Not static: verified once. */
__noinline __u64 port_hash(const struct flow_key *key, __u64 attempt)
{
	const __u64 *words = (const __u64 *)key;
	struct sip s = {
		config.nat_key[0] ^ 0x736f6d6570736575ULL,
		config.nat_key[1] ^ 0x646f72616e646f6dULL,
		config.nat_key[0] ^ 0x6c7967656e657261ULL,
		config.nat_key[1] ^ 0x7465646279746573ULL,
	};
	__u64 last = (__u64)sizeof(*key) << 56 | attempt;

	if (!key)
		return 0;
	for (int i = 0; i < (int)(sizeof(*key) / 8); i++) {
		s.v3 ^= words[i];
		sip_round(&s);
		s.v0 ^= words[i];
	}
	s.v3 ^= last;
	sip_round(&s);
	s.v0 ^= last;
	s.v2 ^= 0xff;
	sip_round(&s);
	sip_round(&s);
	sip_round(&s);
	return s.v0 ^ s.v1 ^ s.v2 ^ s.v3;
}

#endif
