/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The maps. Sizes here are the smallest that load; the agent sets the configured ones. */
#ifndef SHUNT_MAPS_H
#define SHUNT_MAPS_H

#include "hook_maps.h"
#include "tables.h"

/* Not preallocated: memory follows use. Not LRU: nothing evicts a live flow. */
#define HASH_MAP(NAME, KEY, VALUE, ENTRIES)           \
	struct {                                      \
		__uint(type, BPF_MAP_TYPE_HASH);      \
		__uint(max_entries, ENTRIES);         \
		__uint(map_flags, BPF_F_NO_PREALLOC); \
		__type(key, KEY);                     \
		__type(value, VALUE);                 \
	} NAME SEC(".maps")

HASH_MAP(names, __u32, struct svc_name, 1024);
ARRAY_MAP(restarts, struct restarts_val, 1024 / RESTARTS_PER_VAL, BPF_F_MMAPABLE);
ARRAY_MAP(flows, struct flow_line, 1024, BPF_F_MMAPABLE);
HASH_MAP(nat_fwd, struct flow_key, struct nat_fwd_val, 1024);
HASH_MAP(nat_rev, struct flow_key, struct nat_rev_val, 1024);
ARRAY_MAP(nat_refused, struct nat_refused_val, 1024, BPF_F_MMAPABLE);
ARRAY_MAP(nat_excluded, struct ports_val, 3072, BPF_F_MMAPABLE);
HASH_MAP(server_ids, struct server_id_key, struct server_id_val, 1024);
HASH_MAP(masq, struct masq_key, struct masq_val, 64);
ARRAY_MAP(veth_sets, struct veth_set, VETH_SETS, BPF_F_MMAPABLE);
HASH_MAP(echo, struct echo_key, struct echo_val, 1024);
PERCPU_MAP(reasons, struct count, REASON_COUNT);
PERCPU_MAP(events, struct event_count, EVENT_COUNT);
ARRAY_MAP(svc_stats, struct count, 1024, BPF_F_MMAPABLE);
ARRAY_MAP(backend_stats, struct count, 1024, BPF_F_MMAPABLE);
PERCPU_MAP(budget, struct budget_val, 1);
PERCPU_MAP(scratch, struct nat_scratch, 1);
PERCPU_MAP(hook_state, struct hook_state, 1);
PERCPU_MAP(hook_stats, struct count, HOOK_POSITIONS *HOOK_RESULTS);

/* LRU: a datagram is worth remembering for as long as its fragments take to come. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct fragment_key);
	__type(value, struct fragment_val);
} fragments SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 1024);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct masq_net_key);
	__type(value, struct masq_net_val);
} masq_nets SEC(".maps");

/* Counters: of those who are asked for seldom the count begins anew. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, struct masq_refused_key);
	__type(value, struct nat_refused_val);
} masq_refused SEC(".maps");

/* What is forgotten here lets a network begin anew, no more. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, struct rate_key);
	__type(value, struct rate_val);
} rates SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 256 * 1024);
} samples SEC(".maps");

/* A ring has no value type, and clang leaves an enum that is only used as a number out of the
 * BTF: this puts them there, for Python to read. */
struct {
	struct sample sample;
	enum event event;
	enum scope scope;
	enum mode mode;
	enum slot_state slot_state;
	enum backend_flag backend_flag;
	enum flow_state flow_state;
	enum flow_writer flow_writer;
	enum flow_kind flow_kind;
	enum nat_track nat_track;
	enum masq_net masq_net;
	enum svc_flag svc_flag;
	enum vip_flag vip_flag;
	enum hook_position hook_position;
	enum hook_slot hook_slot;
	enum hook_result hook_result;
} abi_types SEC(".data.layout");

#endif
