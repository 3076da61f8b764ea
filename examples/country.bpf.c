/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * A hook that counts packets by the country of their source, and lets all of them pass.
 * `shunt hook load` takes this file by way of bcc, or what clang makes of it: docs/hooks.md.
 */
#include "shunt_hook.h"

#define COUNTRIES 676 /* two letters; the index is 26 * first + second */

struct prefix_key {
	__u32 prefix_length; /* of the 16 bytes: an IPv4 prefix has 96 more */
	__u8 addr[16];
};

struct country_count {
	__u64 packets;
	__u64 bytes;
};

HOOK_TRIE(prefixes, struct prefix_key, __u32, 65536); /* to the country's index */
HOOK_ARRAY(countries, __u32, struct country_count, COUNTRIES);

int hook(struct hook_view *view)
{
	struct prefix_key key = {.prefix_length = 128};
	struct country_count *n;
	__u32 *country;

	__builtin_memcpy(key.addr, view->saddr, sizeof(key.addr));
#ifdef BCC_SEC
	country = prefixes.lookup(&key);
	if (!country)
		return SHUNT_PASS;
	n = countries.lookup(country);
#else
	country = bpf_map_lookup_elem(&prefixes, &key);
	if (!country)
		return SHUNT_PASS;
	n = bpf_map_lookup_elem(&countries, country);
#endif
	if (n) {
		__sync_fetch_and_add(&n->packets, 1);
		__sync_fetch_and_add(&n->bytes, view->len);
	}
	return SHUNT_PASS;
}
