/* SPDX-License-Identifier: Apache-2.0 */
/* The algorithm of maglev.py, which documents it and is what others call; no Python in here.
 *
 * Every loop here does 32-bit additions and compares, no division: at some 1,000 slots a table
 * is bound by mispredicted "is this slot free?" branches and nothing else is worth tuning.
 */
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define FREE	  UINT32_MAX /* a slot nobody owns yet; so there are never 2^32 - 1 backends */
#define MAX_SLOTS (1U << 30) /* positions and steps add up without overflow */

struct backend {
	uint64_t hash[2]; /* what orders backends, and where its preferences come from */
	uint64_t rest;	  /* of slots * weight / weights: who gets the slots left over */
	uint32_t index;	  /* the caller's */
	uint32_t weight;
	uint32_t left; /* slots still to take */
	uint32_t pos, step, stretch;
};

enum problem { OK, NO_MEMORY, NO_BACKEND, CROWDED, BAD_SLOTS, BAD_WEIGHT, TWICE };

static int by_hash(const void *a, const void *b)
{
	const struct backend *x = a, *y = b;

	for (int i = 0; i < 2; i++)
		if (x->hash[i] != y->hash[i])
			return x->hash[i] < y->hash[i] ? -1 : 1;
	return 0;
}

static int by_weight(const void *a, const void *b)
{
	const struct backend *x = a, *y = b;

	if (x->weight != y->weight)
		return x->weight > y->weight ? -1 : 1;
	return by_hash(a, b);
}

static int by_rest(const void *a, const void *b)
{
	const struct backend *x = *(struct backend *const *)a, *y = *(struct backend *const *)b;

	if (x->rest != y->rest)
		return x->rest > y->rest ? -1 : 1;
	return x < y ? -1 : x > y; /* the array is in hash order */
}

static int is_prime(uint32_t n)
{
	if (n < 2)
		return 0;
	for (uint32_t d = 2; d <= n / d; d++)
		if (n % d == 0)
			return 0;
	return 1;
}

/* Largest remainder. A backend whose share is below one slot gets one, and the others share what
 * remains; that may push another below one slot, hence the loop. It ends: as there are at least as
 * many slots as backends, somebody's share always is one slot or more.
 */
static enum problem set_quotas(struct backend *b, uint32_t n, uint32_t slots)
{
	uint64_t weights = 0;
	uint32_t left = slots, before, spare, count = 0;
	struct backend **sharers;

	for (uint32_t i = 0; i < n; i++) {
		weights += b[i].weight;
		b[i].left = 0;
	}
	do {
		uint64_t all_weights = weights;

		before = left;
		for (uint32_t i = 0; i < n; i++) {
			if (b[i].left || (uint64_t)before * b[i].weight >= all_weights)
				continue;
			b[i].left = 1;
			left--;
			weights -= b[i].weight;
		}
	} while (left != before);

	sharers = malloc(n * sizeof(*sharers));
	if (!sharers)
		return NO_MEMORY;
	spare = left;
	for (uint32_t i = 0; i < n; i++) {
		uint64_t share = (uint64_t)left * b[i].weight;

		if (b[i].left)
			continue;
		b[i].left = share / weights;
		b[i].rest = share % weights;
		spare -= b[i].left;
		sharers[count++] = &b[i];
	}
	qsort(sharers, count, sizeof(*sharers), by_rest);
	for (uint32_t i = 0; i < spare; i++)
		sharers[i]->left++;
	free(sharers);
	return OK;
}

/* The slot a backend prefers next. In a table of 2^k slots the step is odd and is stretched by a
 * multiple of four after each turn: start + b*j + c*j^2 with b odd and c even visits every slot
 * once. In a prime table the step stays, as in the paper.
 */
static void set_preferences(struct backend *b, uint32_t slots)
{
	b->pos = b->hash[0] % slots;
	if ((slots & (slots - 1)) == 0) {
		b->step = (b->hash[1] | 1) & (slots - 1);
		b->stretch = (b->hash[1] >> 32) & ~3U & (slots - 1);
	} else {
		b->step = b->hash[1] % (slots - 1) + 1;
		b->stretch = 0;
	}
}

static inline uint32_t next_preference(struct backend *b, uint32_t slots)
{
	uint32_t slot = b->pos;

	b->pos += b->step;
	b->pos -= b->pos >= slots ? slots : 0;
	b->step += b->stretch;
	b->step -= b->step >= slots ? slots : 0;
	return slot;
}

/* One turn. The paper's rule (`claim`) goes on until a slot is free; see maglev.py for ours. */
static inline void take_turn(struct backend *b, uint32_t slots, uint32_t *out, int claim)
{
	uint32_t slot = next_preference(b, slots);

	while (claim && out[slot] != FREE)
		slot = next_preference(b, slots);
	if (out[slot] == FREE) {
		out[slot] = b->index;
		b->left--;
	}
}

/* Backends of one weight, which take their turns together. Turn t comes at time t / weight, whoever
 * else there is, so that a removal changes nobody's order.
 */
struct weight_class {
	uint32_t turn; /* which comes next, from 1 */
	uint32_t weight;
	uint32_t first, count; /* backends, in hash order; who has its quota leaves */
};

static inline int earlier(const struct weight_class *x, const struct weight_class *y)
{
	uint64_t left = (uint64_t)x->turn * y->weight, right = (uint64_t)y->turn * x->weight;

	return left != right ? left < right : x->weight > y->weight;
}

static void sift_down(struct weight_class *heap, uint32_t n, uint32_t at)
{
	struct weight_class moved = heap[at];

	for (uint32_t child; (child = 2 * at + 1) < n; at = child) {
		if (child + 1 < n && earlier(&heap[child + 1], &heap[child]))
			child++;
		if (!earlier(&heap[child], &moved))
			break;
		heap[at] = heap[child];
	}
	heap[at] = moved;
}

/* A turn for each; returns how many want another. */
static uint32_t take_turns(struct backend *b, uint32_t n, uint32_t slots, uint32_t *out, int claim)
{
	uint32_t staying = 0;

	for (uint32_t i = 0; i < n; i++) {
		take_turn(&b[i], slots, out, claim);
		staying += b[i].left != 0;
	}
	if (staying == n)
		return n;
	staying = 0;
	for (uint32_t i = 0; i < n; i++)
		if (b[i].left)
			b[staying++] = b[i];
	return staying;
}

/* `b` is sorted by weight, the heaviest first, which makes the first heap too. Ends: a backend below
 * its quota after trying all slots would have found all of them taken, but the quotas add up to no
 * more than the slots.
 */
static enum problem take_all(struct backend *b, uint32_t n, uint32_t slots, uint32_t *out,
			     int claim)
{
	struct weight_class *heap = malloc(n * sizeof(*heap));
	uint32_t classes = 0;

	if (!heap)
		return NO_MEMORY;
	memset(out, 0xff, slots * sizeof(*out));
	for (uint32_t i = 0; i < n; i++) {
		if (!i || b[i].weight != b[i - 1].weight)
			heap[classes++] = (struct weight_class){1, b[i].weight, i, 0};
		heap[classes - 1].count++;
	}
	while (classes) {
		struct weight_class *next = &heap[0];

		do { /* the last class needs no heap: a quarter faster for the common, equal weights */
			next->count = take_turns(&b[next->first], next->count, slots, out, claim);
		} while (classes == 1 && next->count);
		next->turn++;
		if (!next->count)
			heap[0] = heap[--classes];
		sift_down(heap, classes, 0);
	}
	free(heap);
	return OK;
}

/* Fills `out` with indexes. `culprit` is the index of the backend that BAD_WEIGHT or TWICE means. */
static enum problem fill(struct backend *b, uint32_t n, uint32_t slots, uint32_t *out, int claim,
			 uint32_t *culprit)
{
	enum problem problem;
	int equal = 1;

	for (uint32_t i = 0; i < n; i++) {
		*culprit = i;
		if (!b[i].weight)
			return BAD_WEIGHT;
		equal &= b[i].weight == b[0].weight;
		set_preferences(&b[i], slots);
	}
	qsort(b, n, sizeof(*b), by_hash);
	for (uint32_t i = 1; i < n; i++) {
		*culprit = b[i].index;
		if (!by_hash(&b[i - 1], &b[i]))
			return TWICE;
	}
	problem = set_quotas(b, n, slots);
	if (problem != OK)
		return problem;
	if (!equal)
		qsort(b, n, sizeof(*b), by_weight);
	return take_all(b, n, slots, out, claim);
}
