/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* As abi.h, of streams: TCP between two sockets of this node, whose bytes may pass TCP by. One end is the
 * client's, which connected by way of a VIP; sockops/stream.bpf.c. */
#ifndef SHUNT_ABI_STREAMS_H
#define SHUNT_ABI_STREAMS_H

#include "abi_sockets.h"

/* What became of connections and messages: index of map stream_events. The prefix is the class:
 * LEFT_ (never both ends in the map), REDIRECTED, TCP (a message), TO_TCP_ (a connection, from then
 * on and for ever), GONE (an end), REFUSED_ (a call). */
enum stream_event {
	STREAM_NONE,	      /* of struct stream_val.why: not left to TCP */
	STREAM_PAIRED,	      /* both ends are in the map */
	STREAM_LEFT_REMOTE,   /* the backend is not on this node */
	STREAM_LEFT_OPTION,   /* an end has an option that redirected bytes would not heed */
	STREAM_LEFT_FULL,     /* no room in a map, or another program has the socket */
	STREAM_LEFT_MISMATCH, /* another connection has the same addresses and ports */
	STREAM_LEFT_BRIEF,    /* its client's connections do not pay for being paired */
	STREAM_REDIRECTED,
	STREAM_TCP,	      /* of a connection that was left to TCP before */
	STREAM_TO_TCP_EARLY,  /* bytes had gone by TCP before both ends were in the map */
	STREAM_TO_TCP_BUDGET, /* as much was sent as may lie unread */
	STREAM_TO_TCP_OPTION, /* an end was given an option that redirected bytes would not heed */
	STREAM_TO_TCP_PRESSURE,	 /* the kernel is short of memory for TCP */
	STREAM_TO_TCP_OPTED_OUT, /* its service is not redirected any more */
	STREAM_TO_TCP_ENDED,	 /* the other end is closed, or its record made room */
	STREAM_GONE,		 /* an end that was left to TCP is out of the map again */
	STREAM_REFUSED_ZEROCOPY, /* SO_ZEROCOPY of a socket in the map: its sends would not complete */
	STREAM_EVENTS,
};

struct stream_count { /* map stream_events: per processor */
	__u64 times;
	__u64 bytes; /* of messages */
};

/* A connection being opened: how its server's end, on this node, is found to be its. */
struct stream_dial_key { /* map stream_dials, key */
	__u8 client[16]; /* IPv6, or IPv4-mapped */
	__u8 server[16];
	__u64 netns; /* of addresses that every namespace has; else 0 */
	__u16 client_port;
	__u16 server_port;
	__u32 pad;
};

struct stream_dial_val { /* map stream_dials, value */
	__u64 pair;
	__u32 heard; /* 1: its SYN has come to a listener of this node */
	__u32 pad;
};

enum stream_side { STREAM_CLIENT, STREAM_SERVER };

struct stream_end_key { /* map sock_ends, key; the value is the socket */
	__u64 pair;	/* the cookie of the client's socket */
	__u32 side;	/* enum stream_side */
	__u32 pad;
};

/* What an end sent since the other was seen to have read all. */
struct stream_sent {
	__u32 messages;
	__u32 bytes;
};

struct stream_pair {		    /* map stream_pairs, by the cookie of the client's socket */
	struct stream_sent sent[2]; /* by enum stream_side */
	__u32 client_isn;	    /* both ends know both: they are one connection's */
	__u32 server_isn;
	__u32 ready;	/* 1: both ends are in the map */
	__u32 why;	/* an event TO_TCP_ or LEFT_: TCP for ever; 0 = may be redirected */
	__u32 quiet[2]; /* by side, 1: TCP for ever, and no message of that end is under way */
	__u32 svc;
	__u32 payer; /* of the client, for the server's end */
};

struct stream_val { /* map sock_streams: kept with each end */
	__u64 pair;
	__u64 messages; /* that it sent and that were redirected */
	__u64 bytes;
	__u32 svc;
	__u32 side;	 /* enum stream_side */
	__u32 first_out; /* sequence number of its first byte, */
	__u32 first_in;	 /* and of the other end's; these bytes have not gone by TCP */
	__u32 why;	 /* enum stream_event: why it is on TCP for ever; 0 = it is not */
	__u32 gone;	 /* 1: out of map sock_ends again */
	__u32 payer;	 /* key of map stream_payers */
	__u32 pad;
};

/* An end, as the iterator tells it: the socket, with nothing in a VIP's place, and what it keeps. */
struct stream_row {
	struct sock_row socket;
	struct stream_val stream;
};

struct stream_optin { /* map stream_optins, by service id */
	__u32 redirect;
	__u32 pad;
};

/* A client's process: whether its connections are worth being paired. */
struct stream_payer { /* map stream_payers, by the process's id in the first namespace */
	__s32 credit; /* brief connections; races leave it inexact */
	__u32 dials;  /* while it had none */
};

/* Constants of the loaded programs of streams. */
struct stream_config {
	__u32 messages; /* how many may lie unread, */
	__u32 bytes;	/* and how many bytes of them */
	__u32 brief;	/* a connection whose client sent fewer messages */
	__u32 credit;	/* of a process, at first and at most */
	__u32 trial;	/* of so many dials without credit one is paired */
};

#endif
