/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What a backend's record says of it. */
#ifndef SHUNT_BACKEND_H
#define SHUNT_BACKEND_H

#include "maps.h"
#include "memory.h"

static __always_inline __u8 backend_flags(__u32 id)
{
	struct backend_val *b = id ? bpf_map_lookup_elem(&backends, &id) : NULL;

	return b ? READ_ONCE(b->flags) : 0;
}

static __always_inline bool gets_packets(__u8 flags)
{
	return (flags & (BACKEND_KNOWN | BACKEND_UP)) == (BACKEND_KNOWN | BACKEND_UP);
}

static __always_inline bool is_up(__u32 id)
{
	return gets_packets(backend_flags(id));
}

#endif
