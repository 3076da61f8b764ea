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
enum abi { ABI_VERSION = 4 };

/* Why a packet left the program the way it did: index of map `reasons`.
 * The prefix is the class: PASS_ (to this host's stack), SENT_ (to a backend
 * or a client), DROP_. */
enum reason {
	REASON_PASS_NOT_IP,
	REASON_PASS_NOT_OURS,	     /* no service has this port, or this address and port */
	REASON_PASS_FRAGMENT,	     /* its first fragment, which has the ports, was not sent on */
	REASON_PASS_MALFORMED,	     /* XDP: shorter than its headers say; the stack counts it too */
	REASON_PASS_TO_FRAGMENT,     /* wrapped, too big and without DF: the stack fragments it */
	REASON_PASS_TO_TC,	     /* XDP: its service is of mode local, or of nat and SCTP */
	REASON_SENT_TO_BACKEND,
	REASON_SENT_TO_CLIENT,	     /* a translated reply */
	REASON_SENT_MASQUERADED,     /* TC: out of this node, with its own address */
	REASON_SENT_ERROR_TO_BACKEND, /* an ICMP error, to the backend of the flow it quotes */
	REASON_SENT_ERROR_TO_CLIENT, /* nat: an ICMP error about a client's packet */
	REASON_SENT_ECHO_REPLY,	     /* for a VIP with a live backend */
	REASON_SENT_RST_NO_BACKEND,  /* TCP to a service with no backend */
	REASON_SENT_UNREACHABLE,     /* UDP or SCTP to a service with no backend */
	REASON_SENT_RST_NO_FLOW,     /* nat: not a SYN, and no flow is known */
	REASON_SENT_TOO_BIG,	     /* does not fit the next hop; its sender was told the MTU */
	REASON_DROP_NO_BACKEND,	     /* none, and an answer was not due (an RST) or over its budget */
	REASON_DROP_TOO_BIG,	     /* and its sender is not to be told: no DF, or over the budget */
	REASON_DROP_NO_NEXTHOP,	     /* neither the agent nor the FIB knows the neighbour */
	REASON_DROP_TTL_EXPIRED,
	REASON_DROP_NO_HEADROOM,     /* the driver left no room for an outer header */
	REASON_DROP_NAT_NO_FLOW,     /* an RST, ICMP error or fragment of a flow that is not known */
	REASON_DROP_NAT_NO_PORT,     /* every port tried is taken towards this backend */
	REASON_DROP_NAT_SCTP_PORT,   /* TC: another has its port, and SCTP cannot get a new one */
	REASON_DROP_NAT_TABLE_FULL,
	REASON_DROP_NAT_NO_SOURCE,   /* no address of this host in the backend's family */
	REASON_DROP_NAT_OVER_BUDGET, /* too many new flows a second */
	REASON_DROP_NAT_INVALID,     /* TC: not what TCP or SCTP may say in its flow's state */
	REASON_DROP_NAT_MALFORMED,   /* TC: ours, and shorter than its headers say */
	REASON_DROP_NAT_FRAGMENT,    /* TC: to be masqueraded, and its first one was not */
	REASON_DROP_NAT_CLASH,	     /* TC: to a backend itself, in the tuple of a flow to a VIP */
	REASON_DROP_NAT46_FRAGMENT,  /* to or from a backend of the other family: not translated */
	REASON_DROP_NAT46_NO_EQUAL,  /* likewise: the other family has nothing like it */
	REASON_DROP_NAT46_NOT_XDP,   /* TC: the backend is of the other family */
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
	EVENT_NAT_COLLISION,	/* a port was taken, or another's; the next was tried */
	EVENT_NAT_ADOPTED,	/* another processor translated the flow first */
	EVENT_FIB_FALLBACK,	/* the next hop came from the FIB helper */
	EVENT_SAMPLE_LOST,	/* the ring of samples was full */
	EVENT_FRAGMENT_FIRST,	/* remembered, so that the next ones follow it */
	EVENT_FRAGMENT_LATE,	/* its first was seen too long ago */
	EVENT_QUIC_BY_ID,	/* went where its connection id says */
	EVENT_QUIC_FIRST,	/* a first flight, whose id the client chose: as any datagram */
	EVENT_QUIC_UNROUTABLE,	/* an id that names no server of the service: likewise */
	EVENT_QUIC_DOWN,	/* an id whose backend is failing: likewise */
	EVENT_FRAGMENT_EARLY,	/* for a VIP, and its first is not known */
	EVENT_COUNT,
};

/* Internal and external traffic differ only inside a cluster. */
enum scope {
	SCOPE_EXTERNAL,
};

/* Map services is a hash of our own in an array, for three reasons: a look-up reads one cache line
 * (the kernel's reads three); an entry's service is replaced by one store; and a dropped entry is
 * used again only after a grace period, so that none is recycled under its readers. A key's home
 * is the line that its hash names; it stands there or in one of the `reach` lines after it.
 *
 * The shortcut saves a packet the look into map svc, one cache miss of five: where the slots are, and
 * in which mode, of a service in a mode of direct server return without flags of packets. It names its
 * service, for it is not read together with the key. Zero sends a packet the longer way. */
#define SVC_LINE_ENTRIES    2
#define SVC_REACH_MAX	    15
#define SVC_REACH_SHIFT	    24
#define SHORTCUT_SVC_SHIFT  40
#define SHORTCUT_MODE_SHIFT 38

struct svc_entry {
	__u8 vip[16]; /* IPv6, or IPv4-mapped */
	__be16 port; /* 0 = every one that no other entry has */
	__u8 proto;  /* IPPROTO_TCP, IPPROTO_UDP, IPPROTO_SCTP */
	__u8 scope;  /* enum scope */
	/* Written last, with port, proto and scope as one word: the service, 0 = no entry; and, in a
	 * line's first entry, the reach of the keys whose home the line is. */
	__u32 svc_reach; /* reach << SVC_REACH_SHIFT | service */
	__u64 shortcut;	 /* svc << 40 | mode << 38 | first slot << 8 | log2 of their number */
};

struct svc_line { /* map services, by line; mmap-ed */
	struct svc_entry entry[SVC_LINE_ENTRIES];
};

enum mode {
	MODE_NONE,	 /* no such service */
	MODE_LOCAL,	 /* TC's alone: a backend on this node, which sees the client */
	MODE_DSR_IPIP,	 /* from here on XDP's */
	MODE_DSR_L2,
	MODE_NAT,
	MODE_DSR_GENEVE,
};

/* svc_val.flags. Of a service without any, map svc_options is never read. */
enum svc_flag {
	SVC_AFFINITY = 1,    /* a client's new connections go where its last one went */
	SVC_HASH_CLIENT = 2, /* the client's address alone chooses the slot */
	SVC_SOURCES = 4,     /* only some clients are served */
	SVC_RATE = 8,	     /* new connections of a client network are limited */
	SVC_QUIC = 16,	     /* connection ids name their backends */
	SVC_NO_SOCKETS = 32, /* sockets see its VIPs; packets never look at this one, */
	SVC_NODE = 64,	     /* nor at this: it asks for this node's own addresses */
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
	__u8  quic_config; /* the first three bits of a connection id that a server made */
	__u8  quic_id_bytes; /* of a server id, which comes after the first octet, */
	__u8  quic_nonce_bytes; /* and of the nonce, which comes after that */
	__u8  pad0;
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

#define SERVER_ID_MAX 15

struct server_id_key {	 /* map server_ids, key */
	__u8  id[SERVER_ID_MAX]; /* zero-padded */
	__u8  id_bytes;
	__u32 svc;
	__u32 pad0;
};

/* `word` is read before and after the rest, which says whether the kernel has recycled the element
 * under its reader. */
struct server_id_val {	 /* map server_ids, value */
	__u64 word;	 /* service << 32 | backend */
	__u8  id[SERVER_ID_MAX]; /* as in the key */
	__u8  id_bytes;
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
	__u32  ifindex; /* without the device's own VLANs */
	__u32  tags;	 /* of its frames: bpf/vlan.h */
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

/* What TC has seen of a flow (bpf/track.h): bits that are only ever added, so that it does not matter which
 * processor was first. The forward entry has all; the reverse one the backend's, of SCTP the client's too.
 * Those that say broken are taken away by their side; NAT_TRACKED by XDP, if the flow goes on there. */
enum nat_track {
	NAT_TRACKED = 1,      /* TC made the flow, and saw all of it; without it the other bits mean nothing */
	NAT_ANSWERED = 2,     /* by the backend; TCP: SYN-ACK; SCTP: INIT ACK */
	NAT_ASSURED = 4,      /* a packet of the client came after that; TCP, SCTP: established */
	NAT_ENDED_CLIENT = 8, /* FIN, SHUTDOWN */
	NAT_ENDED_BACKEND = 16,
	NAT_BROKEN = 32,      /* RST, ABORT: the client's, */
	NAT_MASQUERADED = 64, /* what the flow is, from its beginning: see struct masq_val */
	NAT_ECHOED = 128,     /* SCTP: COOKIE ECHO, after NAT_ANSWERED */
	NAT_BROKEN_BACKEND = 256, /* and the backend's */
};

/* How a client's packets came, which is how its replies go back. */
struct last_hop {
	__u8  peer[6];	 /* who sent the frame: a router, or the client */
	__u16 pad0;
	__u8  own[6];	 /* whom it was sent to: this host */
	__u16 pad1;
	__u32 ifindex;
	__u32 tags;	 /* of the frame, without priorities: bpf/vlan.h */
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
	__u32  track;	 /* enum nat_track */
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
	__u8   hairpin;	 /* 1: of mode local, to the backend that sent it; TC's alone */
	__u8   handed;	 /* 1: of mode local, past the stack where the backend's veth has a program */
	__u8   pad;
	__u32  track;	 /* enum nat_track */
	struct last_hop back; /* mode local: zero unless `handed`, for the stack knows the way */
};

/* Who translates: what comes in at one hook may pass another as it goes out. */
enum way {
	WAY_XDP,
	WAY_TC_IN,
	WAY_TC_OUT,
};

/* A device by which packets leave the node, and the addresses of this host that they get there. A
 * masqueraded flow stands in maps nat_fwd and nat_rev with whom it is for as the VIP. Service and
 * backend are those of the flow to a VIP that it goes on with; 0 if it is nobody's. */
struct masq_key {	 /* map masq, key */
	__u32 ifindex;
};

struct masq_val {	 /* map masq, value */
	__u8 saddr4[16]; /* IPv4-mapped; zero = none */
	__u8 saddr6[16];
};

struct masq_net_key {	 /* map masq_nets, key: the longest prefix decides */
	__u32 prefix_bits;
	__u8  addr[16];	 /* IPv6, or IPv4-mapped */
};

enum masq_net {
	MASQ_NET_SOURCE = 1, /* who has an address here is masqueraded, */
	MASQ_NET_NOT_TO = 2, /* but not to those that have one here */
};

struct masq_net_val {	 /* map masq_nets, value */
	__u32 kinds;	 /* enum masq_net */
};

/* Which veth devices have their other end in another network namespace: each stands in the set of its
 * index's lower bits. */
#define VETH_SETS 2048
#define VETH_WAYS 4

struct veth_set {	 /* map veth_sets, by ifindex % VETH_SETS; mmap-ed */
	__u32 ifindex[VETH_WAYS]; /* 0 = free */
};

/* New flows for which no port towards the backend was free. */
struct nat_refused_val { /* map nat_refused, by backend id; mmap-ed */
	__u64 flows;
};

/* The same for masqueraded flows of no service: towards whom. */
struct masq_refused_key { /* map masq_refused, key; its value is a nat_refused_val */
	__u8   addr[16]; /* IPv6, or IPv4-mapped */
	__be16 port;
	__u8   proto;	 /* IPPROTO_* */
	__u8   pad0;
};

/* A datagram whose first fragment was sent on. */
struct fragment_key {	 /* map fragments, key */
	__u8  saddr[16];
	__u8  daddr[16];
	__u32 id;	 /* as it stands in the header */
	__u8  proto;	 /* IPv4 only: in IPv6 it is no part of what names a datagram */
	__u8  way; 	 /* enum way: each follows what it has translated itself */
	__u16 pad0;
};

struct fragment_val {	 /* map fragments, value: what only the first one says */
	__u64  seen_ns;
	__u32  svc;
	__u32  backend;	 /* 0: a reply, to a client */
	__u32  hash;	 /* of the flow, as its service wants it */
	__be16 sport;
	__be16 dport;
	__u8   proto;
	__u8   pad[7];
};

#define QUOTE_BYTES 56 /* an IPv6 header, a fragment's, and 8 */
#define SCRATCH_BYTES 256

/* Too large for the stack; packets of one processor are handled one after the other. */
struct nat_scratch {	 /* map scratch: per processor, one element */
	struct nat_fwd_val fwd;
	struct nat_rev_val rev;
	struct flow_key key;
	/* Of what is no plain packet: bpf/other.h. */
	struct flow_key to;	 /* translated: the tuple as it leaves */
	struct fragment_key fragment;
	struct last_hop back;	 /* to a client */
	struct server_id_key server_id;
	__u8  quic[8];		 /* a packet's first octets */
	__u32 svc;
	__u32 backend;		 /* 0: to a client */
	__u32 mode;
	__u32 pad;
	__u8 fib[64];		 /* struct bpf_fib_lookup */
	__u8 quoted[QUOTE_BYTES]; /* TC: what an answer quotes */
	__u8 hop[24];		 /* struct hop */
	__u8 bytes[SCRATCH_BYTES]; /* of a packet */
};

/* What is known of an address without a port. */
enum vip_flag {
	VIP_AT_TC = 1 << 30, /* its fragments may be TC's: XDP can't tell which are missing */
};

/* The VIPs with a backend that lives, as long as the agent has them here; this host's own addresses are
 * left out, which the stack answers for. */
struct echo_key {	 /* map echo, key */
	__u8 vip[16];	 /* IPv6, or IPv4-mapped */
};

struct echo_val {	 /* map echo, value */
	__u32 svc;	 /* for whom an echo request is answered, 0 = for none; enum vip_flag */
};

struct ports_val {	 /* maps ports, nat_excluded: TCP's 1,024 words, UDP's, SCTP's; mmap-ed */
	__u64 bits;	 /* a port somebody serves, or one of nat's own; one that nat must not give */
};

#define ANY_PORT_TCP 1
#define ANY_PORT_UDP 2
#define ANY_PORT_SCTP 4

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
	__u32 check_mark;	 /* as in struct check_config: TC leaves those packets alone */
	__u8  test_clock;	 /* 1: time is `test_now_ns`, set by the test */
	__u8  masquerade;	 /* 1: map masq may have devices */
	__u8  handover_peer; /* 1: packets go to the other end of what is in map veth_sets */
	__u8  pad;
	__u32 bond;		 /* ifindex of the bond that everything comes in by; 0 = none */
	__u32 pad1;
};

/* Why decap let a packet go the way it did: index of map `decap_reasons`. What passes does so
 * untouched. From ANSWERED on: of packets that leave (xdp/answer.bpf.c). */
enum decap_reason {
	DECAP_UNWRAPPED,
	DECAP_PASS_NOT_TUNNEL,
	DECAP_PASS_SOURCE,	/* a tunnel's packet, but not from an accepted source */
	DECAP_PASS_NOT_OURS,	/* the outer address is another host's, to which this one forwards */
	DECAP_PASS_FRAGMENT,	/* of the outer packet */
	DECAP_PASS_OPTIONS,	/* the outer header has options or extension headers */
	DECAP_PASS_MALFORMED,	/* the outer header is damaged or longer than the frame */
	DECAP_PASS_INNER,	/* the inner packet is not what the outer header says */
	DECAP_PASS_GENEVE,	/* Geneve, but not as the balancer writes it: bpf/geneve.h */
	DECAP_DROP_CONGESTED,	/* marked on the way, and only loss tells the inner's sender */
	DECAP_DROP_ADDRESS,	/* Geneve: for none of the addresses that decap was given */
	DECAP_DROP_PROTOCOL,	/* Geneve: neither TCP nor UDP nor an ICMP error about those */
	DECAP_DROP_CLASH,	/* its tuple is that of a flow to another VIP, or to a VIP at all */
	DECAP_DROP_FULL,	/* Geneve: a new flow, and no room to remember its way back */
	DECAP_ANSWERED,		/* Geneve: sent on with the VIP as its source */
	DECAP_CLAMPED,		/* a SYN-ACK whose MSS left no room for outer headers */
	DECAP_DROP_ANSWER,	/* Geneve: there was no memory to translate it */
	DECAP_COUNT,
};

#define DECAP_SOURCES 8

struct decap_source {	 /* a prefix of outer sources */
	__u8  addr[16];	 /* IPv6, or IPv4-mapped; nothing set below the mask */
	__u8  mask[16];
};

/* How long the way back of a silent flow is kept. */
struct way_lives {
	__u64 opening_ns; /* TCP: only a SYN was seen */
	__u64 open_ns;
	__u64 closing_ns; /* TCP: one end has sent its FIN */
	__u64 over_ns;	 /* TCP: both have, or one an RST */
	__u64 udp_ns;
};

/* Constants of one loaded decap program, and of the program for answers. */
struct decap_config {
	struct decap_source source4[DECAP_SOURCES];
	struct decap_source source6[DECAP_SOURCES];
	__u8  address4[DECAP_SOURCES][16]; /* this host's, of services behind Geneve; the first */
	__u8  address6[DECAP_SOURCES][16]; /* stands for VIPs of other backends' family */
	struct way_lives lives;
	__u32 count4;	 /* how many of each are in use */
	__u32 count6;
	__u32 own4;
	__u32 own6;
};

/* A flow that came through Geneve, as the backend sees it. */
struct way_key {	 /* map ways_back, key */
	__u8   client[16]; /* IPv6, or IPv4-mapped */
	__u8   addr[16];
	__be16 client_port;
	__be16 port;
	__u8   proto;
	__u8   pad[3];
} __attribute__((aligned(8)));

enum way_flag {
	WAY_OPEN = 1,	      /* TCP: more than a SYN */
	WAY_FIN_CLIENT = 2,
	WAY_FIN_BACKEND = 4,
	WAY_RST = 8,
};

/* `check` is read before and after the rest: it says whether the kernel has recycled the element
 * under its reader. */
struct way_val {	 /* map ways_back, value */
	__u64  check;	 /* of the key; never 0 */
	__u8   vip[16];
	__be16 vip_port;
	__u16  outer_bytes; /* of all outer headers */
	__u32  flags;	 /* enum way_flag */
	__u64  seen_ns;
};

struct tunneled_key {	 /* map tunneled, key */
	__u8  vip[16];
};

struct tunneled_val {	 /* map tunneled, value */
	__u64 outer_bytes; /* of its packets' outer headers: the most there was */
};

/* An answer whose first fragment was translated. */
struct answer_key {	 /* map answers, key */
	__u8  saddr[16];
	__u8  daddr[16];
	__u32 id;	 /* as it stands in the header */
	__u32 proto;	 /* IPv4 only */
};

struct answer_val {	 /* map answers, value */
	__u8  vip[16];
};

/* Constants of one loaded check program. */
struct check_config {
	__u8  saddr4[16]; /* of outer headers, as in struct lb_config */
	__u8  saddr6[16];
	__u32 spread4;	 /* mask of the bits that differ from check to check, host order */
	__u32 spread6;
	__u32 mark;	 /* of checks' packets; the bits of SLOT_BACKEND_MASK are the backend */
	__u32 pad;
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
