/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Every map key, map value and reason: written here once. Python derives its
 * NumPy dtypes and enums from the BTF of these types; nothing is retyped.
 *
 * __be* is network order, __u* host order. Every pad is named and zero.
 * A map, its Python table and its metric label share one name.
 */
#ifndef SHUNT_ABI_H
#define SHUNT_ABI_H

#include <linux/types.h>

#include "../xdp/shunt_hook.h"

/* Raised when the meaning of a pinned map changes without its size changing. */
enum abi { ABI_VERSION = 2 };

/* Why a packet left the program the way it did: index of map `reasons`.
 * The prefix is the class: PASS_ (to this host's stack), SENT_ (to a backend
 * or a client), DROP_. */
enum reason {
	REASON_PASS_NOT_IP,
	REASON_PASS_NOT_OURS,	     /* no service has this port, or this address and port */
	REASON_PASS_FRAGMENT,	     /* has no ports to look at */
	REASON_PASS_MALFORMED,	     /* shorter than its headers say; the stack counts it too */
	REASON_SENT_TO_BACKEND,
	REASON_SENT_TO_CLIENT,	     /* a translated reply */
	REASON_SENT_RST_NO_BACKEND,  /* TCP to a service with no backend */
	REASON_SENT_UNREACHABLE,     /* UDP to a service with no backend */
	REASON_SENT_RST_NO_FLOW,     /* nat: not a SYN, and no flow is known */
	REASON_SENT_TOO_BIG,	     /* does not fit the next hop; its sender was told the MTU */
	REASON_DROP_NO_BACKEND,	     /* none, and an answer was not due (an RST) or over its budget */
	REASON_DROP_TOO_BIG,	     /* and the sender could not be told (over the budget) */
	REASON_DROP_NO_NEXTHOP,	     /* neither the agent nor the FIB knows the neighbour */
	REASON_DROP_TTL_EXPIRED,
	REASON_DROP_NO_HEADROOM,     /* the driver left no room for an outer header */
	REASON_DROP_NAT_NO_FLOW,     /* an RST for a flow that is not known */
	REASON_DROP_NAT_NO_PORT,     /* every port tried is taken towards this backend */
	REASON_DROP_NAT_TABLE_FULL,
	REASON_DROP_NAT_NO_SOURCE,   /* no address of this host in the backend's family */
	REASON_DROP_SOURCE_DENIED,   /* the service does not serve this client */
	REASON_DROP_RATE_LIMITED,    /* too many new connections from this client's network */
	REASON_DROP_HOOK,	     /* a user's hook said so */
	REASON_DROP_BAD_TABLE,	     /* tables contradict each other: a defect, please report */
	REASON_COUNT,
};

/* What happened on the way: index of map `events`. */
enum event {
	EVENT_FLOW_REMEMBERED,
	EVENT_FLOW_TABLE_FULL,	/* not remembered: the table is full */
	EVENT_FLOW_OVER_BUDGET, /* not remembered: too many insertions a second */
	EVENT_FLOW_UNPROTECTED, /* not remembered, and `prev` is down: may move later */
	EVENT_CLIENT_REMEMBERED,
	EVENT_CLIENT_NOT_REMEMBERED, /* table full, or over budget: its affinity is lost */
	EVENT_NAT_CREATED,
	EVENT_NAT_COLLISION,	/* a port was taken; the next was tried */
	EVENT_NAT_ADOPTED,	/* another processor translated the flow first */
	EVENT_FIB_FALLBACK,	/* the next hop came from the FIB helper */
	EVENT_SAMPLE_LOST,	/* the ring of samples was full */
	EVENT_COUNT,
};

/* Internal and external traffic differ only inside a cluster. */
enum scope {
	SCOPE_EXTERNAL,
};

/* Map services is a hash of our own in an array, for three reasons: a look-up reads one cache line
 * (the kernel's reads three); an entry's service is replaced by one store; and a dropped entry is
 * used again only after a grace period, so that none is recycled under its readers. A key's home
 * is the line that its hash names; it stands there or in one of the `reach` lines after it. */
#define SVC_LINE_ENTRIES 2
#define SVC_REACH_MAX	 15

struct svc_entry {
	__u8 vip[16]; /* IPv6, or IPv4-mapped */
	__be16 port; /* 0 = every one that no other entry has */
	__u8 proto;  /* IPPROTO_TCP, IPPROTO_UDP */
	__u8 scope;  /* enum scope */
	__u32 svc;   /* written last, with port, proto and scope as one word; 0 = no entry */
	__u32 reach; /* in a line's first entry: of the keys whose home the line is */
	__u32 pad;
};

struct svc_line { /* map services, by line; mmap-ed */
	struct svc_entry entry[SVC_LINE_ENTRIES];
};

enum mode {
	MODE_NONE,	 /* no such service */
	MODE_DSR_IPIP,
	MODE_DSR_L2,
	MODE_NAT,
};

/* svc_val.flags. Of a service without any, map svc_options is never read. */
enum svc_flag {
	SVC_AFFINITY = 1,    /* a client's new connections go where its last one went */
	SVC_HASH_CLIENT = 2, /* the client's address alone chooses the slot */
	SVC_SOURCES = 4,     /* only some clients are served */
	SVC_RATE = 8,	     /* new connections of a client network are limited */
};

/* With SVC_HASH_CLIENT these bits of a flow's hash are the flow's own, so that a client's flows
 * have more than one home in map flows; the slot is in the others. */
#define HASH_OWN_BITS 12

/* svc_val.region: one word, so that one load sees a consistent pair. */
#define REGION_LOG2_BITS 8

struct svc_val {	 /* map svc, by service id; mmap-ed */
	__u64 region;	 /* first slot << REGION_LOG2_BITS | log2 of the number of slots */
	__u64 idle_ns;	 /* a flow silent for longer may be forgotten */
	__u8  mode;	 /* enum mode */
	__u8  proto;	 /* IPPROTO_* */
	__u16 flags;	 /* enum svc_flag */
	__u32 pad0;
	__u64 pad1;	 /* to 32 bytes: two to a cache line */
};

struct svc_options {	 /* map svc_options, by service id; mmap-ed */
	__u64 affinity_ns; /* since its last new connection */
	__u64 rate_gap_ns; /* between new connections of a client network, in the long run */
	__u64 rate_burst_ns; /* how far ahead of that it may be */
	__u8  rate_mask4[16]; /* which bits of a client's (mapped) address are its network */
	__u8  rate_mask6[16];
	__u32 sources;	 /* the service's set in map sources */
	__u32 pad0;
	__u64 digest;	 /* of that set: for the agent */
};

struct source_key {	 /* map sources, key: the longest prefix decides */
	__u32  prefix_bits; /* SOURCE_SET_BITS, and those of the address */
	__be32 set;
	__u8   addr[16]; /* IPv6, or IPv4-mapped */
};

#define SOURCE_SET_BITS 32

struct source_val {	 /* map sources, value */
	__u32 allow;
};

struct rate_key {	 /* map rates, key */
	__u8  network[16];
	__u32 svc;
	__u32 pad0;
};

struct rate_val {	 /* map rates, value */
	__u64 due_ns;	 /* when as many connections as came would have been due */
};

/* A slot is one 8-byte word: read by one load, written by one aligned store.
 *   bits  0..23  cur: the backend that owns it now, 0 = none
 *   bits 24..47  prev: the owner from before the first change
 *   bits 48..49  enum slot_state */
#define SLOT_BACKEND_BITS 24
#define SLOT_BACKEND_MASK ((1U << SLOT_BACKEND_BITS) - 1)
#define SLOT_STATE_SHIFT  48

enum slot_state {
	SLOT_SETTLED,	 /* the hash alone decides */
	SLOT_MOVING,	 /* flows are looked up and remembered */
	SLOT_LINGERING,	 /* flows are looked up; none is remembered any more */
};

struct slot_val {	 /* map slots; mmap-ed, written by the agent alone */
	__u64 word;
};

/* Map restarts: one byte a slot, set by the program when a flow could not be
 * remembered, so that the slot's quiet window begins anew; cleared by the agent. */
#define RESTARTS_PER_VAL 8

struct restarts_val {	 /* map restarts; mmap-ed */
	__u8 slot[RESTARTS_PER_VAL];
};

/* backend_val.flags */
enum backend_flag {
	BACKEND_KNOWN = 1,    /* the record is in use; without it the backend is gone */
	BACKEND_UP = 2,	      /* not failing: gets packets */
	BACKEND_DRAINED = 4,  /* by the operator: no new flows; kept across restarts */
	BACKEND_REMOVED = 8,  /* out of the configuration: its TCP flows may end in peace */
	BACKEND_IPV6 = 16,
};

struct backend_val {	 /* map backends, by backend id; mmap-ed. Id 0 is no backend. */
	__u8   addr[16]; /* IPv6, or IPv4-mapped */
	__u32  nexthop;	 /* index of map nexthops; 0 = ask the FIB */
	__u32  svc;	 /* the service it belongs to */
	__be16 port;	 /* 0 = the frontend's */
	__u16  weight;	 /* set by the operator at run time; 0 = as configured */
	__u8   flags;	 /* enum backend_flag */
	__u8   pad0[3];
};

/* The first word holds all that changes while a next hop is in use: one store. */
struct nexthop_val {	 /* map nexthops, by index; mmap-ed. Index 0 is never resolved. */
	__u8   dmac[6];	 /* zero = unresolved */
	__u16  mtu;
	__u8   smac[6];
	__u16  pad0;
	__u32  ifindex;
	__u32  pad1;
	__u8   saddr[16]; /* this host's address towards it; zero = none */
	__u8   addr[16];  /* the gateway, or the on-link backend: for people and restarts */
};

/* The five-tuple as it stands in the packet; dport, proto and scope as in a svc_entry. */
struct flow_key {	 /* of map flows; maps nat_fwd and nat_rev, key */
	__u8   saddr[16];
	__u8   daddr[16];
	__be16 dport;
	__u8   proto;
	__u8   scope;
	__be16 sport;
	__u8   kind;	 /* enum flow_kind */
	__u8   pad;
};

/* Map flows remembers clients of services with affinity too: saddr is the client's, daddr begins
 * with the service's id, ports are 0. */
enum flow_kind {
	FLOW_KIND_FLOW,
	FLOW_KIND_CLIENT,
};

enum flow_state {
	FLOW_FREE,	 /* a line that has no flow; its word is 0 */
	FLOW_CLAIMED,	 /* somebody is writing a flow into the line, */
	FLOW_CLEARING,	 /* or taking it out; the word's backend is an enum flow_writer */
	FLOW_OPENING,	 /* only a SYN was seen */
	FLOW_CONFIRMED,
	FLOW_CLOSING,	 /* FIN or RST was seen */
};

/* A program's claim lasts some nanoseconds; one that an agent left when it was killed is found by
 * the next. */
enum flow_writer {
	FLOW_BY_PROGRAM,
	FLOW_BY_AGENT,
};

/* flow_line.word, all of a flow that changes: one word, so that it is read by one load and changed
 * by one compare-and-swap.
 *   bits  0..23  the backend
 *   bits 24..26  enum flow_state
 *   bits 27..63  when it was seen last: ns of the monotonic clock >> FLOW_TICK_SHIFT */
#define FLOW_BACKEND_MASK ((1U << FLOW_STATE_SHIFT) - 1)
#define FLOW_STATE_SHIFT  24
#define FLOW_STATE_MASK	  7
#define FLOW_SEEN_SHIFT	  27
#define FLOW_TICK_SHIFT	  26 /* a tick is 67 ms */

/* flow_line.near: for each flow whose home the line is (FLOW_SIBLINGS at most) FLOW_NEAR_BITS bits,
 * then zeros:
 *   bits 0..6   its distance from home in lines, plus one
 *   bits 7..11  the top bits of its hash, so that hardly any line is read in vain */
#define FLOW_DISTANCE_BITS 7
#define FLOW_TAG_BITS	   5
#define FLOW_TAG_MASK	   ((1U << FLOW_TAG_BITS) - 1)
#define FLOW_NEAR_BITS	   (FLOW_DISTANCE_BITS + FLOW_TAG_BITS)
#define FLOW_NEAR_MASK	   ((1U << FLOW_NEAR_BITS) - 1)
#define FLOW_REACH	   ((1 << FLOW_DISTANCE_BITS) - 1)
#define FLOW_SIBLINGS	   5
#define FLOW_TRIES	   16 /* to change `near` while others do */

struct flow_line {	 /* map flows, by line; mmap-ed: bpf/flow_table.h */
	struct flow_key key;
	__u64 word;
	__u64 near;	 /* the flows whose home this line is */
	__u32 hash;	 /* the flow's */
	__u32 isn;	 /* FLOW_OPENING: the SYN's sequence number, host order */
};

#define NAT_FIN_CLIENT	1
#define NAT_FIN_BACKEND 2
#define NAT_RST		4

/* How a client's packets came, which is how its replies go back. */
struct last_hop {
	__u8  peer[6];	 /* who sent the frame: a router, or the client */
	__u16 pad0;
	__u8  own[6];	 /* whom it was sent to: this host */
	__u16 pad1;
	__u32 ifindex;
	__u32 pad2;
};

/* `word` is read by one load: the kernel recycles a deleted element's memory under its readers,
 * and a hash that is not the packet's says that this happened.
 *
 * From the client: key is the tuple as the client sends it. */
struct nat_fwd_val {	 /* map nat_fwd, value */
	__u64  word;	 /* hash of this key << 32 | backend id */
	__u64  seen_ns;
	__u8   saddr[16]; /* this host's address, put in the client's place */
	__be16 sport;	 /* and its port */
	__be16 dport;	 /* the backend's port */
	__u32  svc;
	__u32  pad0;
	__u8   state;	 /* enum flow_state */
	__u8   closed;	 /* NAT_* seen in this direction */
	__u8   pad1[2];
	struct last_hop from;
};

/* From the backend: key is the tuple as the backend answers it. */
struct nat_rev_val {	 /* map nat_rev, value */
	__u64  word;	 /* hash of this key << 32 | backend id */
	__u64  seen_ns;
	__u8   client[16];
	__u8   vip[16];
	__be16 client_port;
	__be16 vip_port;
	__u32  svc;
	__u8   closed;	 /* NAT_* seen in this direction */
	__u8   pad[7];
	struct last_hop back;
};

/* Too large for the stack; packets of one processor are handled one after the other. */
struct nat_scratch {	 /* map scratch: per processor, one element */
	struct nat_fwd_val fwd;
	struct nat_rev_val rev;
	struct flow_key key;
};

struct ports_val {	 /* map ports: TCP's 1,024 words, then UDP's; mmap-ed */
	__u64 bits;	 /* a port somebody serves, or one of nat's own */
};

#define ANY_PORT_TCP 1
#define ANY_PORT_UDP 2

struct meta_val {	 /* map meta: one element; mmap-ed */
	enum abi abi;	 /* of whoever made the pinned maps */
	__u32 any_port;	 /* ANY_PORT_*: whether there are frontends of port 0 */
	__u64 generation; /* of the configuration in force */
	__u64 hash_seed; /* the flows in these maps were hashed with it */
};

struct count {		 /* maps reasons, hook_stats, per processor; svc_stats, backend_stats, below */
	__u64 packets;
	__u64 bytes;
};

/* Maps svc_stats and backend_stats are flat and mmap-ed: processor * elements + id. A per-processor
 * map would read a pointer first, one more cache line for every packet. */

struct event_count {	 /* map events: per processor */
	__u64 times;
};

/* Tokens of one processor for one second. */
struct budget_val {	 /* map budget: per processor, one element */
	__u64 since_ns;
	__u32 inserts;
	__u32 answers;
	__u32 samples;
	__u32 pad;
};

struct svc_name {	 /* map names, by service id: what a restarted agent finds again */
	char name[128];	 /* "NAME/tcp", zero-padded */
};

enum hook_position {
	HOOK_POSITION_PRE,
	HOOK_POSITION_POST,
	HOOK_POSITIONS,
};

/* Map hooks, a program array. What comes after a user's hook stands in the slot after it. */
enum hook_slot {
	HOOK_ENTRY,   /* where shunt_lb goes: HOOK_ENTER's program, or empty without a hook */
	HOOK_PRE_LB,  /* the user's */
	HOOK_BALANCE,
	HOOK_POST_LB, /* the user's */
	HOOK_EXIT,
	HOOK_ENTER,   /* the program that HOOK_ENTRY gets with the first hook */
	HOOK_SLOTS,
};

/* Map hook_stats: HOOK_RESULTS elements for each position. HOOK_INVALID + n is mark n. */
enum hook_result {
	HOOK_PASSED,
	HOOK_DROPPED,
	HOOK_INVALID, /* an answer that is none: passed */
	HOOK_RESULTS = HOOK_INVALID + 1 + HOOK_MARK_MAX,
};

struct hook_state {	 /* map hook_state: per processor, one element; no hook sees it */
	__u32 action;
	__u32 reason;
	__u32 svc;
	__u32 backend;
	__u32 len;	 /* of the packet as it came */
	__u32 mark;
};

#define SAMPLE_BYTES 96

struct sample {		 /* ring samples */
	__u64 time_ns;
	__u32 reason;
	__u32 ifindex;
	__u32 svc;
	__u32 backend;
	__u32 len;	 /* of the whole packet */
	__u32 captured;	 /* bytes of it in `data` */
	__u8  data[SAMPLE_BYTES];
};

/* Constants of one loaded program: the verifier removes what they rule out. */
struct lb_config {
	__u32 services_mask;	/* lines of map services, less one */
	__u32 flows_mask;	/* lines of map flows, less one */
	__u32 services;		/* elements of map svc */
	__u32 backends;		/* elements of map backends */
	__u64 hash_seed;	 /* equal on all nodes that share VIPs */
	__u64 nat_key[2];	 /* secret of this node: where a flow's port search begins */
	__u8  ipip_saddr4[16];	 /* IPv4-mapped; low bits filled from the flow hash */
	__u8  ipip_saddr6[16];
	__u32 ipip_spread4;	 /* mask of those low bits, host order */
	__u32 ipip_spread6;
	__u32 inserts_per_s;	 /* flows remembered a second, for each processor */
	__u32 answers_per_s;	 /* ICMP errors */
	__u32 samples_per_s;
	__u16 nat_port_min;	 /* host order */
	__u16 nat_port_count;
	__u8  test_clock;	 /* 1: time is `test_now_ns`, set by the test */
	__u8  pad[7];
};

/* Why decap let a packet go the way it did: index of map `decap_reasons`. What passes does so
 * untouched. */
enum decap_reason {
	DECAP_UNWRAPPED,
	DECAP_PASS_NOT_TUNNEL,
	DECAP_PASS_SOURCE,	/* a tunnel's packet, but not from an accepted source */
	DECAP_PASS_NOT_OURS,	/* the outer address is another host's, to which this one forwards */
	DECAP_PASS_FRAGMENT,	/* of the outer packet */
	DECAP_PASS_OPTIONS,	/* the outer header has options or extension headers */
	DECAP_PASS_MALFORMED,	/* the outer header is damaged or longer than the frame */
	DECAP_PASS_INNER,	/* the inner packet is not what the outer header says */
	DECAP_DROP_CONGESTED,	/* marked on the way, and only loss tells the inner's sender */
	DECAP_COUNT,
};

#define DECAP_SOURCES 8

struct decap_source {	 /* a prefix of outer sources */
	__u8  addr[16];	 /* IPv6, or IPv4-mapped; nothing set below the mask */
	__u8  mask[16];
};

/* Constants of one loaded decap program. */
struct decap_config {
	struct decap_source source4[DECAP_SOURCES];
	struct decap_source source6[DECAP_SOURCES];
	__u32 count4;	 /* how many of each are in use */
	__u32 count6;
};

/* What became of frames after a program had sent them: xdp/trace.bpf.c. */
enum loss {
	LOSS_ABORTED,	/* the program failed, or its verdict is none that the driver knows */
	LOSS_TX,	/* not sent back out of the interface that it came in on */
	LOSS_REDIRECT,	/* the kernel did not hand it on; counted where it came in */
	LOSS_XMIT,	/* the driver of the interface towards the backend did not take it */
};

#define LOSSES_MAX 1024

struct loss_key {	 /* map losses, key */
	__u32 ifindex;
	enum loss kind;
	__u32 error;	 /* errno; 0: the driver named none, as when a queue is full */
};

struct loss_val {	 /* map losses, value */
	__u64 frames;
};

/* Constants of one loaded trace program. */
struct trace_config {
	__u32 netns_inum; /* interfaces of this network namespace alone */
};

#endif
