/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Internet checksums (RFC 1071), whole and incremental (RFC 1624). */
#ifndef SHUNT_CHECKSUM_H
#define SHUNT_CHECKSUM_H

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

/* A sum of 32 bits that is worth the same. */
static __always_inline __u64 fold32(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	return (sum & 0xffffffff) + (sum >> 32);
}

static __always_inline __u16 csum_fold(__u64 sum)
{
	sum = fold32(sum);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

/* Sum of `words` 32-bit words in the order they stand in memory. One after the other: clang 14 would
 * load all of them first, for which there is no stack. */
static __always_inline __u64 csum_add(__u64 sum, const void *from, int words)
{
	const __u32 *word = from;

#pragma unroll
	for (int i = 0; i < words; i++) {
		sum += word[i];
		barrier_var(sum);
	}
	return sum;
}

static __always_inline __u64 csum_sub(__u64 sum, const void *from, int words)
{
	const __u32 *word = from;

#pragma unroll
	for (int i = 0; i < words; i++) {
		sum += (__u32)~word[i];
		barrier_var(sum);
	}
	return sum;
}

/* Returns what the sum of everything changes by, of which the checksum itself is a part. */
static __always_inline __u64 swap_check(__sum16 *check, __u64 change)
{
	__u64 sum = (__u16) ~*check;

	*check = csum_fold(sum + change);
	return sum + *check;
}

#endif
