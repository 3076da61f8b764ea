/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What is kept with a socket, and freed with it by the kernel. */
#ifndef SHUNT_STORAGE_H
#define SHUNT_STORAGE_H

#define SOCKET_STORAGE(NAME, VALUE)                    \
	struct {                                       \
		__uint(type, BPF_MAP_TYPE_SK_STORAGE); \
		__uint(map_flags, BPF_F_NO_PREALLOC);  \
		__type(key, int);                      \
		__type(value, VALUE);                  \
	} NAME SEC(".maps")

#endif
