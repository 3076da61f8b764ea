/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Which clients a service serves: map sources. */
#ifndef SHUNT_SOURCES_H
#define SHUNT_SOURCES_H

#include "packet.h"
#include "step.h"
#include "tables.h"

static __always_inline bool source_allowed(const __u8 *addr, __u32 set)
{
	struct source_key key = {
		.prefix_bits = SOURCE_SET_BITS + 128,
		.set = bpf_htonl(set),
	};
	struct source_val *found;

	__builtin_memcpy(key.addr, addr, 16);
	found = bpf_map_lookup_elem(&sources, &key);
	step(STEP_SOURCE, found && found->allow, set);
	return found && found->allow; /* each set says what holds for all others */
}

#endif
