/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* For the log: which bind() was refused, and to whom. */
#ifndef SHUNT_REFUSED_H
#define SHUNT_REFUSED_H

#include "abi_sockets.h"
#include "packet.h"

/* A page: as many as are told in a second. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096);
} sock_refused SEC(".maps");

static __always_inline void tell_refused(const struct bind_ask *ask)
{
	struct bind_refused *told = bpf_ringbuf_reserve(&sock_refused, sizeof(*told), 0);

	if (!told)
		return;
	__builtin_memset(told, 0, sizeof(*told));
	if (!is_mapped(ask->addr) || ipv4_of(ask->addr))
		__builtin_memcpy(told->addr, ask->addr, 16);
	told->cgroup = bpf_get_current_cgroup_id();
	told->port = ask->port;
	told->proto = ask->proto;
	told->pid = bpf_get_current_pid_tgid() >> 32;
	bpf_get_current_comm(told->comm, sizeof(told->comm));
	bpf_ringbuf_submit(told, BPF_RB_NO_WAKEUP);
}

#endif
