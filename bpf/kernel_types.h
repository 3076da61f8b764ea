/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What is read of the kernel's own types: where each field stands is found when a program is loaded. */
#ifndef SHUNT_KERNEL_TYPES_H
#define SHUNT_KERNEL_TYPES_H

#include <linux/types.h>

#define KERNEL_TYPE __attribute__((preserve_access_index))

struct ns_common {
	unsigned int inum;
} KERNEL_TYPE;

struct net {
	__u64 net_cookie;
	struct ns_common ns;
} KERNEL_TYPE;

typedef struct {
	struct net *net;
} possible_net_t;

#endif
