/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* As abi.h, of what programs do at sockets: translate, close, list. */
#ifndef SHUNT_ABI_SOCKETS_H
#define SHUNT_ABI_SOCKETS_H

#include "abi.h"

/* What became of a socket's call: index of map sock_reasons. The prefix is the class: PASS_ (the
 * address stays as it is), TO_BACKEND, REFUSED_ (the call fails). */
enum sock_reason {
	SOCK_PASS_NOT_OURS,	  /* no service has this address and port */
	SOCK_PASS_NAMESPACE,	  /* a socket of a network namespace that is not covered */
	SOCK_PASS_CHECK,	  /* a health check by way of the VIP */
	SOCK_PASS_FAMILY,	  /* no backend of a family that this call can address */
	SOCK_PASS_SOURCE_UNKNOWN, /* only some clients are served, and which this is shows later */
	SOCK_PASS_BAD_TABLE,	  /* tables contradict each other: a defect, please report */
	SOCK_TO_BACKEND_CONNECT,  /* TCP, or UDP that is connected */
	SOCK_TO_BACKEND_SEND,	  /* a datagram of a socket that is not */
	SOCK_REFUSED_NO_BACKEND,
	SOCK_REFUSED_SOURCE,	/* the service does not serve this client */
	SOCK_REFUSED_NO_MEMORY, /* its answers could not be translated back */
	SOCK_PASS_CGROUP,	/* of a process in an excluded control group */
	SOCK_PASS_SERVICE,	/* the service has `sockets: off` */
	SOCK_PASS_BIND,		/* a bind() that takes nothing of ours */
	SOCK_REFUSED_NODE_PORT, /* a bind() to the port of a service on this node's addresses */
	SOCK_REASONS,
};

/* A control group below which sockets see VIPs. Ids are the kernel's, of version 2. */
struct cgroup_key { /* map sock_excluded, key */
	__u64 id;
};

struct cgroup_val { /* map sock_excluded, value */
	__u64 excluded;
};

#define CGROUP_LEVELS 32 /* below the root; deeper ones are not told apart from their ancestors */

/* Ports that services have on addresses of this node, whichever these are: four sets of 1,024
 * words, of IPv4's TCP and UDP, and of IPv6's. Which address has them stands in map services. */
struct node_ports_val { /* map sock_node_ports; mmap-ed */
	__u64 bits;
};

struct bind_refused {  /* ring sock_refused; read once a second, and what it has no room for is
			  * counted alone */
	__u8 addr[16]; /* IPv6, or IPv4-mapped; zero: every one */
	__u64 cgroup;
	__be16 port;
	__u8 proto;
	__u8 pad;
	__u32 pid;
	char comm[16];
};

/* A socket that has something in a VIP's place, as the iterators tell it. */
struct sock_row {
	__u64 netns;   /* the namespace's cookie */
	__u64 cgroup;  /* id of the socket's control group */
	__u64 inode;   /* as in /proc/PID/fd; 0: no process has it any more */
	__u64 seen_ns; /* as in struct sock_flow, likewise the rest of these */
	__u64 cookie;  /* 0: it has none */
	__u8 vip[16];
	__u8 addr[16];
	__u8 own[16]; /* its own address; IPv6, or IPv4-mapped */
	__be16 vip_port;
	__be16 port;
	__u16 own_port; /* host order */
	__u8 proto;
	__u8 state; /* the kernel's TCP_*, of UDP too */
	__u32 backend;
	__u32 netns_inum;
	__u32 uid;
	__u8 ipv6;	/* the socket's family */
	__u8 connected; /* 0: of one of those that it sent to */
	__u16 pad;
};

/* What a socket has in a VIP's place. Kept with the socket (map sock_peers, if it is connected;
 * map sock_flows for whom it sent to otherwise), and freed with it by the kernel. */
struct sock_flow {     /* map sock_peers, value */
	__u8 vip[16];  /* IPv6, or IPv4-mapped; as the program said */
	__u8 addr[16]; /* the backend's */
	__be16 vip_port;
	__be16 port;
	__u32 backend;
	__u64 seen_ns; /* sent or connected last; 0 = no flow */
};

/* Of one socket, a power of two; the longest silent one makes room. */
#define SOCK_FLOWS 8

struct sock_flows_val { /* map sock_flows, value */
	struct sock_flow flow[SOCK_FLOWS];
};

/* A client of a service with affinity: a whole network namespace. */
struct sock_client_key { /* map sock_clients, key */
	__u64 netns;
	__u32 svc;
	__u32 pad;
};

/* `word` is read by one load, as in nat_fwd_val: a check of client and backend << 32 | backend id. */
struct sock_client_val { /* map sock_clients, value */
	__u64 word;
	__u64 seen_ns;
};

enum sock_family { SOCK_IPV4 = 1, SOCK_IPV6 = 2 };

struct sock_ask {    /* what a socket's backend depends on, beside the tables */
	__u64 netns; /* the namespace's cookie */
	__u64 now_ns;
	__u8 vip[16]; /* IPv6, or IPv4-mapped */
	__be16 port;
	__u8 proto;
	__u8 families; /* enum sock_family: what the call can address */
	__u32 entropy;
	struct sock_flow kept; /* what the socket has for this VIP already */
};

struct sock_answer {
	__u8 addr[16];
	__be16 port;
	__u16 pad0;
	__u32 reason; /* enum sock_reason; of TO_BACKEND_, the connected one */
	__u32 svc;
	__u32 backend;
	__u32 sources; /* which set of map sources has to allow it; 0 = everybody is served */
	__u32 pad1;
};

struct sock_try { /* the syscall program's context */
	struct sock_ask ask;
	struct sock_answer answer;
	__u64 cgroups[CGROUP_LEVELS]; /* of the process, from the outermost; then zeros */
};

struct bind_ask {      /* what a bind()'s end depends on, beside the tables */
	__u64 netns;   /* the namespace's cookie */
	__u8 addr[16]; /* IPv6, or IPv4-mapped; zero: every one */
	__be16 port;
	__u8 proto;
	__u8 ipv6_only; /* 1: the socket has IPV6_V6ONLY */
	__u32 pad0;
};

struct bind_try { /* the syscall program's context */
	struct bind_ask ask;
	__u32 reason; /* enum sock_reason */
	__u32 pad0;
};

/* Constants of the loaded socket programs. */
struct sock_config {
	__u64 netns;	     /* the cookie of this node's own network namespace */
	__u32 services_mask; /* lines of map services, less one */
	__u32 all;	     /* 1: sockets of every namespace; 0: of `netns` alone */
	__u32 check_mark;    /* as in struct check_config */
	__u32 mptcp;	     /* 1: the kernel has Multipath TCP */
	__u32 excludes;	     /* 1: map sock_excluded may have something */
	__u32 pad0;
};

/* Constants of the programs that look for stale sockets. */
struct stale_config {
	__u8 tcp; /* 1: of TCP as well as of UDP */
	__u8 pad0[7];
};

/* A connected socket that was given a backend which has gone, as those programs tell of it. */
struct stale_socket {
	__u64 cookie;	/* 0 = it has none yet */
	__u8 saddr[16]; /* its own address: IPv6, or IPv4-mapped */
	__u8 daddr[16]; /* the backend's */
	__be16 sport;
	__be16 dport;
	__u32 netns;   /* the namespace's inode */
	__u32 ifindex; /* what it is bound to; 0 = nothing */
	__u8 family;   /* AF_INET or AF_INET6 */
	__u8 proto;    /* IPPROTO_* */
	__u16 pad0;
};

#endif
