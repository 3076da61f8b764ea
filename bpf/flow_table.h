/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Map flows: a hash in an array, a flow to a cache line; for programs and (kern/_flows.c) for the
 * agent alike. Whoever includes this says first how a line is had from its index: line_at().
 *
 * A flow's home is the line that its hash names. It stands there or in one of the lines
 * after it, and stays; the home's `near` says where its flows are. So a look-up reads one line,
 * or two, whether the flow is there or not. (In the manner of hopscotch hashing: Herlihy, Shavit,
 * Tzafrir, DISC 2008; without its displacements.)
 *
 * Programs on all processors and the agent write at the same time, and nobody waits:
 *   - A line is claimed by a compare-and-swap of `word` from free, and is its claimer's until
 *     `word` says what is in it. Readers look only at lines whose word says so.
 *   - The entry in `near` is added and taken out while the line is claimed, before and after the flow's
 *     life, by a compare-and-swap. That is also the order among those that insert one flow at
 *     once: who finds an earlier entry that leads to the same flow gives its own line back.
 *   - Whoever changes or ends a flow swaps the word it has read, and has lost if it is another by
 *     now.
 */
#ifndef SHUNT_FLOW_TABLE_H
#define SHUNT_FLOW_TABLE_H

#include "abi.h"
#include "likely.h"
#include "memory.h"

static __always_inline __u64 flow_word(__u32 backend, __u32 state, __u64 now_ns)
{
	return now_ns >> FLOW_TICK_SHIFT << FLOW_SEEN_SHIFT | (__u64)state << FLOW_STATE_SHIFT |
	       backend;
}

static __always_inline __u32 flow_backend(__u64 word)
{
	return word & FLOW_BACKEND_MASK;
}

static __always_inline __u32 flow_state(__u64 word)
{
	return word >> FLOW_STATE_SHIFT & FLOW_STATE_MASK;
}

static __always_inline __u64 flow_seen(__u64 word) /* in ticks */
{
	return word >> FLOW_SEEN_SHIFT;
}

/* What stands in a line's word while somebody writes the line. */
static __always_inline __u64 flow_claim_word(enum flow_writer writer, enum flow_state state)
{
	return flow_word(writer, state, 0);
}

static __always_inline int same_key(const struct flow_key *a, const struct flow_key *b)
{
	const __u64 *x = (const __u64 *)a, *y = (const __u64 *)b;

	/* What differs most comes first: ports, then the client. */
	return x[4] == y[4] && x[1] == y[1] && x[0] == y[0] && x[3] == y[3] && x[2] == y[2];
}

struct flow_at { /* a flow that was found */
	struct flow_line *line;
	__u64 word;
	__u32 distance; /* from its home */
};

/* What stands in a home's `near` for a flow: never 0. */
static __always_inline __u32 flow_near(__u32 hash, __u32 distance)
{
	return hash >> (32 - FLOW_TAG_BITS) << FLOW_DISTANCE_BITS | (distance + 1);
}

static __always_inline __u32 flow_distance(__u64 near)
{
	return (near & ((1U << FLOW_DISTANCE_BITS) - 1)) - 1;
}

static __always_inline int flow_find(void *table, __u32 mask, const struct flow_key *key,
				     __u32 hash, struct flow_at *at)
{
	struct flow_line *home = line_at(table, hash & mask), *line;
	__u64 near = home ? READ_ONCE(home->near) : 0;

	for (int i = 0; i < FLOW_SIBLINGS && near; i++, near >>= FLOW_NEAR_BITS) {
		__u32 distance = flow_distance(near);
		__u64 word;

		if (unlikely((flow_near(hash, 0) ^ near) >> FLOW_DISTANCE_BITS & FLOW_TAG_MASK))
			continue;
		line = unlikely(distance) ? line_at(table, (hash + distance) & mask) : home;
		if (!line)
			return 0;
		word = READ_ONCE(line->word);
		if (unlikely(flow_state(word) < FLOW_OPENING || !same_key(&line->key, key)))
			continue;
		/* Between the two reads the line may have become another flow's. */
		if ((READ_ONCE(line->word) ^ word) & FLOW_BACKEND_MASK)
			continue;
		*at = (struct flow_at){line, word, distance};
		return 1;
	}
	return 0;
}

static __always_inline int flow_swap(struct flow_line *line, __u64 word, __u64 by)
{
	return __sync_val_compare_and_swap(&line->word, word, by) == word;
}

/* Write the word of a line that one has claimed: now it is everybody's. */
static __always_inline void flow_publish(struct flow_line *line, __u64 word)
{
	__sync_lock_test_and_set(&line->word, word);
}

/* Puts a flow of its own into a home's `near`. False if it has as many as it can already, or others
 * come in between again and again. `*before`: what was there. */
static __always_inline int flow_add(struct flow_line *home, __u32 hash, __u32 distance,
				    __u64 *before)
{
	for (int i = 0; i < FLOW_TRIES; i++) {
		__u64 old = READ_ONCE(home->near);

		if (old >> (FLOW_NEAR_BITS * (FLOW_SIBLINGS - 1)))
			return 0;
		if (__sync_val_compare_and_swap(&home->near, old,
						old << FLOW_NEAR_BITS |
							flow_near(hash, distance)) == old) {
			*before = old;
			return 1;
		}
	}
	return 0;
}

/* Takes it out again. What is left there if others come in between again and again leads to a line
 * with another key, which a look-up passes over. */
static __always_inline void flow_remove(struct flow_line *home, __u32 hash, __u32 distance)
{
	const __u32 mine = flow_near(hash, distance);

	for (int i = 0; i < FLOW_TRIES; i++) {
		__u64 old = READ_ONCE(home->near), rest = old, below = 0;
		int n;

		for (n = 0; n < FLOW_SIBLINGS && (rest & FLOW_NEAR_MASK) != mine; n++) {
			below = below << FLOW_NEAR_BITS | FLOW_NEAR_MASK;
			rest >>= FLOW_NEAR_BITS;
		}
		if (n == FLOW_SIBLINGS ||
		    __sync_val_compare_and_swap(&home->near, old,
						(old & below) | (old >> FLOW_NEAR_BITS & ~below)) ==
			    old)
			return;
	}
}

/* Free a line that one has claimed. */
static __always_inline void flow_free(void *table, __u32 mask, struct flow_line *line,
				      __u32 distance)
{
	struct flow_line *home = line_at(table, line->hash & mask);

	if (home)
		flow_remove(home, line->hash, distance);
	flow_publish(line, 0);
}

/* False if another has changed it meanwhile. */
static __always_inline int flow_delete(void *table, __u32 mask, const struct flow_at *at,
				       enum flow_writer writer)
{
	if (!flow_swap(at->line, at->word, flow_claim_word(writer, FLOW_CLEARING)))
		return 0;
	flow_free(table, mask, at->line, at->distance);
	return 1;
}

/* Another flow in the place of an ended one with the same key; false as above. */
static __always_inline int flow_renew(const struct flow_at *at, __u32 isn, __u64 word,
				      enum flow_writer writer)
{
	if (!flow_swap(at->line, at->word, flow_claim_word(writer, FLOW_CLAIMED)))
		return 0;
	at->line->isn = isn;
	flow_publish(at->line, word);
	return 1;
}

/* A free line, claimed; NULL if there is none within reach. */
static __always_inline struct flow_line *flow_claim(void *table, __u32 mask, __u32 hash,
						    enum flow_writer writer, __u32 *distance)
{
	for (__u32 d = 0; d < FLOW_REACH && d <= mask; d++) {
		struct flow_line *line = line_at(table, (hash + d) & mask);

		if (!line)
			break;
		if (READ_ONCE(line->word) ||
		    !flow_swap(line, 0, flow_claim_word(writer, FLOW_CLAIMED)))
			continue;
		*distance = d;
		return line;
	}
	return NULL;
}

/* Whether a flow could be inserted; for who may not try. */
static __always_inline int flow_has_room(void *table, __u32 mask, __u32 hash)
{
	struct flow_line *line = line_at(table, hash & mask);

	if (!line || READ_ONCE(line->near) >> (FLOW_NEAR_BITS * (FLOW_SIBLINGS - 1)))
		return 0;
	for (__u32 d = 0; d < FLOW_REACH && d <= mask; d++) {
		line = line_at(table, (hash + d) & mask);
		if (line && !READ_ONCE(line->word))
			return 1;
	}
	return 0;
}

/* The word of the line among `near` that has the key, or soon will; 0 = none. */
static __always_inline __u64 flow_among(void *table, __u32 mask, const struct flow_key *key,
					__u32 hash, __u64 near)
{
	for (int i = 0; i < FLOW_SIBLINGS && near; i++, near >>= FLOW_NEAR_BITS) {
		struct flow_line *line = line_at(table, (hash + flow_distance(near)) & mask);
		__u64 word = line ? READ_ONCE(line->word) : 0;

		if (word && flow_state(word) != FLOW_CLEARING && same_key(&line->key, key))
			return word;
	}
	return 0;
}

/* FLOW_THERE: it is (`*word` says with which backend), or another processor, to which the same
 * will have occurred, is just inserting it. */
enum flow_inserted { FLOW_INSERTED, FLOW_THERE, FLOW_NO_ROOM };

static __always_inline enum flow_inserted flow_insert(void *table, __u32 mask,
						      const struct flow_key *key, __u32 hash,
						      __u32 isn, __u64 *word,
						      enum flow_writer writer)
{
	struct flow_line *home = line_at(table, hash & mask), *line;
	const __u64 *from = (const __u64 *)key;
	__u64 before, other, *to;
	__u32 distance = 0;

	line = flow_claim(table, mask, hash, writer, &distance);
	if (!home || !line)
		return FLOW_NO_ROOM;
	to = (__u64 *)&line->key;
	for (__u32 i = 0; i < sizeof(*key) / sizeof(*to); i++)
		to[i] = from[i];
	line->hash = hash;
	line->isn = isn;
	if (!flow_add(home, hash, distance, &before)) {
		flow_publish(line, 0);
		return FLOW_NO_ROOM;
	}
	other = flow_among(table, mask, key, hash, before);
	if (other) {
		flow_free(table, mask, line, distance);
		if (flow_state(other) != FLOW_CLAIMED)
			*word = other;
		return FLOW_THERE;
	}
	flow_publish(line, *word);
	return FLOW_INSERTED;
}

#endif
