/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Which backend a socket gets in a VIP's place. One decision, whoever asks: the hooks of connect()
 * and sendmsg(), and the syscall program, through which tests and people try it.
 *
 * A connection of a socket is a new one, and has no source port yet: it takes any slot of its
 * service, and of that the owner. So there is nothing to track.
 */
#ifndef SHUNT_CHOOSE_H
#define SHUNT_CHOOSE_H

#include "abi_sockets.h"
#include "frontend.h"

/* A backend may go between its slot's being read and its own record, and of mixed families many
 * slots may be of no use to a socket. Other slots of the service are then drawn; when so many were
 * of no use, all of the region are looked at in turn, as far as a call may be held up for that. */
#define SLOT_TRIES	16
#define SLOTS_SEEN_LOG2 16

#define SEEN_AGAIN_NS 1000000000ULL

/* LRU: what is forgotten lets a client begin anew, no more. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct sock_client_key);
	__type(value, struct sock_client_val);
} sock_clients SEC(".maps");

static __always_inline bool same_address(const __u8 *a, const __u8 *b)
{
	const __u64 *left = (const __u64 *)a, *right = (const __u64 *)b;

	return left[0] == right[0] && left[1] == right[1];
}

/* The backend of this id, if it serves `svc`, has `flags` and none of `without`. */
static __always_inline struct backend_val *find_backend(__u32 id, __u32 svc, __u8 flags,
							__u8 without)
{
	struct backend_val *b = bpf_map_lookup_elem(&backends, &id);

	if (!id || !b || b->svc != svc || (READ_ONCE(b->flags) & (flags | without)) != flags)
		return NULL;
	return b;
}

static __always_inline bool fits(const struct backend_val *b, __u32 families)
{
	return families & (b->flags & BACKEND_IPV6 ? SOCK_IPV6 : SOCK_IPV4);
}

/* One that may get a new connection. */
static __always_inline struct backend_val *find_open(__u32 id, __u32 svc)
{
	return find_backend(id, svc, BACKEND_KNOWN | BACKEND_UP, BACKEND_DRAINED | BACKEND_REMOVED);
}

static __always_inline __be16 port_of(const struct backend_val *b, const struct sock_ask *ask)
{
	return b->port ?: ask->port;
}

static __always_inline void take(struct sock_answer *answer, const struct backend_val *b, __u32 id,
				 const struct sock_ask *ask)
{
	__builtin_memcpy(answer->addr, b->addr, 16);
	answer->port = port_of(b, ask);
	answer->backend = id;
	answer->reason = SOCK_TO_BACKEND_CONNECT;
	step(STEP_BACKEND, id, b->flags);
}

/* As with packets, a flow follows its backend, also a draining one, until it was silent for long. */
static __always_inline bool keep(struct sock_answer *answer, const struct sock_ask *ask,
				 const struct svc_val *service)
{
	const struct sock_flow *kept = &ask->kept;
	struct backend_val *b;

	if (!kept->seen_ns || ask->now_ns - kept->seen_ns > service->idle_ns)
		return false;
	b = find_backend(kept->backend, answer->svc, BACKEND_KNOWN | BACKEND_UP, 0);
	/* By now the id may be another backend's. */
	if (!b || !same_address(b->addr, kept->addr) || port_of(b, ask) != kept->port)
		return false;
	take(answer, b, kept->backend, ask);
	return true;
}

static __always_inline __u32 client_check(const struct sock_client_key *key,
					  const struct backend_val *b)
{
	const __u64 *addr = (const __u64 *)b->addr;
	__u64 x = stir(stir(key->netns) ^ ((__u64)key->svc << 16 | b->port));

	return stir(stir(x ^ addr[0]) ^ addr[1]) >> 32;
}

/* The backend that this client's last connection had, while that takes new ones. */
static __always_inline bool recall_client(struct sock_answer *answer, const struct sock_ask *ask,
					  const struct sock_client_key *key, __u64 affinity_ns)
{
	struct sock_client_val *seen = bpf_map_lookup_elem(&sock_clients, key);
	struct backend_val *b;
	__u64 word, when;

	if (!seen)
		return false;
	word = READ_ONCE(seen->word);
	when = READ_ONCE(seen->seen_ns);
	if ((__s64)(ask->now_ns - when) > (__s64)affinity_ns)
		return false;
	b = find_open((__u32)word, key->svc);
	if (!b || !fits(b, ask->families) || word >> 32 != client_check(key, b))
		return false;
	if (!DRY_RUN && (__s64)(ask->now_ns - when) > (__s64)SEEN_AGAIN_NS)
		WRITE_ONCE(seen->seen_ns, ask->now_ns);
	step(STEP_CLIENT, (__u32)word, 1);
	take(answer, b, (__u32)word, ask);
	return true;
}

static __always_inline void remember_client(const struct sock_answer *answer,
					    const struct sock_ask *ask,
					    const struct sock_client_key *key)
{
	struct sock_client_val val = {.seen_ns = ask->now_ns};
	__u32 id = answer->backend;
	struct backend_val *b = bpf_map_lookup_elem(&backends, &id);

	step(STEP_CLIENT, id, 0);
	if (DRY_RUN || !b)
		return;
	val.word = (__u64)client_check(key, b) << 32 | id;
	bpf_map_update_elem(&sock_clients, key, &val, BPF_ANY);
}

/* What slots are asked for, and what was found. Scalars alone: 6.1 loses what a pointer points to
 * when it is kept in a callback's context. */
struct slot_search {
	__u32 first, log2; /* the region */
	__u32 hash;	   /* the next draw */
	__u32 slot;	   /* the one drawn last, where a search in turn begins */
	__u32 svc;
	__u32 families;
	__u32 backend; /* found; 0 = none */
	__u32 reason;
};

static __always_inline __u32 draw(struct slot_search *search)
{
	search->slot = (__u64)search->hash << search->log2 >> 32;
	step(STEP_HASH, search->hash, search->log2);
	search->hash = search->hash * 1664525 + 1013904223; /* Numerical Recipes' generator */
	return search->slot;
}

/* Returns whether others need not be asked. One without an owner tells nothing of them: an agent
 * that was killed may have written half of them. */
static __always_inline bool try_slot(struct slot_search *search, __u32 of_region)
{
	__u32 id, slot = search->first + of_region;
	struct backend_val *b;
	struct slot_val *s;

	s = bpf_map_lookup_elem(&slots, &slot);
	if (!s) {
		search->reason = SOCK_PASS_BAD_TABLE;
		return true;
	}
	step(STEP_SLOT, slot, s->word);
	id = READ_ONCE(s->word) & SLOT_BACKEND_MASK;
	b = find_open(id, search->svc);
	if (!b)
		return false;
	if (fits(b, search->families)) {
		search->backend = id;
		return true;
	}
	search->reason = SOCK_PASS_FAMILY;
	return false;
}

static long try_another(__u32 n, struct slot_search *search)
{
	__u32 mask = (1ULL << (search->log2 & 31)) - 1;

	/* One has been drawn before. */
	return try_slot(search, n < SLOT_TRIES - 1 ? draw(search) :
						     (search->slot + n - (SLOT_TRIES - 1)) & mask);
}

/* The owner of a slot, beginning at the one that `hash` names. */
static __always_inline void take_slot(struct sock_answer *answer, const struct sock_ask *ask,
				      const struct svc_val *service, __u32 hash)
{
	__u64 region = READ_ONCE(service->region);
	__u32 log2 = region & ((1 << REGION_LOG2_BITS) - 1);
	__u32 size = log2 < SLOTS_SEEN_LOG2 ? 1 << log2 : 1 << SLOTS_SEEN_LOG2;
	struct slot_search search = {
		.first = region >> REGION_LOG2_BITS,
		.log2 = log2,
		.hash = hash,
		.svc = answer->svc,
		.families = ask->families,
		.reason = SOCK_REFUSED_NO_BACKEND,
	};
	struct backend_val *b;
	__u32 id;

	if (!try_slot(&search, draw(&search)))
		bpf_loop(SLOT_TRIES - 1 + size, try_another, &search, 0);
	answer->reason = search.reason;
	id = search.backend;
	if (!id)
		return;
	b = bpf_map_lookup_elem(&backends, &id);
	if (b)
		take(answer, b, id, ask);
}

static __always_inline void choose_of(struct sock_answer *answer, const struct sock_ask *ask,
				      const struct svc_val *service)
{
	struct sock_client_key key = {.netns = ask->netns, .svc = answer->svc};
	__u32 hash = ask->entropy, id = answer->svc;
	struct svc_options *o;

	o = bpf_map_lookup_elem(&svc_options, &id);
	answer->reason = SOCK_PASS_BAD_TABLE;
	if (!o)
		return;
	if (service->flags & SVC_SOURCES)
		answer->sources = READ_ONCE(o->sources);
	if (keep(answer, ask, service))
		return;
	if (service->flags & SVC_AFFINITY && recall_client(answer, ask, &key, o->affinity_ns))
		return;
	if (service->flags & SVC_HASH_CLIENT)
		hash = stir(ask->netns) * 0xc4ceb9fe1a85ec53ULL >> 32;
	take_slot(answer, ask, service, hash);
	if (service->flags & SVC_AFFINITY && answer->reason == SOCK_TO_BACKEND_CONNECT)
		remember_client(answer, ask, &key);
}

/* The service that has the VIP and port, whose sockets get backends. NULL if none: `answer`, which is
 * zero, says why. */
static __always_inline struct svc_val *find_service(const struct sock_ask *ask,
						    struct sock_answer *answer, __u32 services_mask)
{
	struct flow_key key __attribute__((aligned(8))) = {};
	bool ipv6 = !is_mapped(ask->vip), served;
	struct svc_val *service;
	__u64 unused;
	__u32 id;

	answer->reason = SOCK_PASS_NOT_OURS;
	__builtin_memcpy(key.daddr, ask->vip, 16);
	set_ports(&key, 0, ask->port, ask->proto);
	served = is_served(&key);
	step(STEP_PORT, served, 0);
	if (!served)
		return NULL;
	answer->svc =
		look_up_service(&key, ipv6, frontend_hash(&key, ipv6, dport_proto_scope(&key)),
				services_mask, &unused);
	if (!answer->svc)
		return NULL;
	answer->reason = SOCK_PASS_BAD_TABLE;
	/* 6.1 takes keys from the stack alone, not from what a function is given. */
	id = answer->svc;
	service = bpf_map_lookup_elem(&svc, &id);
	if (!service || service->mode == MODE_NONE)
		return NULL;
	step(STEP_SERVICE, service->mode, service->flags);
	answer->reason = SOCK_PASS_SERVICE;
	return service->flags & SVC_NO_SOCKETS ? NULL : service;
}

/* Fills `answer`, which is zero. Control groups, and source ranges, remain to be looked at. */
static __always_inline void choose(const struct sock_ask *ask, struct sock_answer *answer,
				   __u32 services_mask)
{
	struct svc_val *service = find_service(ask, answer, services_mask);

	if (service)
		choose_of(answer, ask, service);
}

#endif
