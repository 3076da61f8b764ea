/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What is read of the kernel's own types: where each field stands is found when a program is loaded. */
#ifndef SHUNT_KERNEL_SOCK_H
#define SHUNT_KERNEL_SOCK_H

#include <linux/types.h>

#define KERNELS __attribute__((preserve_access_index))

struct seq_file;

struct ns_common {
	unsigned int inum;
} KERNELS;

struct net {
	__u64 net_cookie;
	struct ns_common ns;
} KERNELS;

struct kernfs_node {
	__u64 id;
} KERNELS;

struct cgroup {
	struct kernfs_node *kn;
} KERNELS;

struct inode {
	unsigned long i_ino;
} KERNELS;

struct file {
	struct inode *f_inode;
} KERNELS;

struct socket {
	struct file *file;
} KERNELS;

struct in6_words {
	__u32 word[4];
};

typedef struct {
	struct net *net;
} possible_net_t;

typedef struct {
	unsigned int val;
} kuid_t;

struct sock_common {
	__u32 skc_rcv_saddr;
	__u16 skc_num;
	unsigned short skc_family;
	volatile unsigned char skc_state;
	unsigned char skc_ipv6only : 1;
	possible_net_t skc_net;
	struct in6_words skc_v6_rcv_saddr;
} KERNELS;

struct sock_cgroup_data {
	struct cgroup *cgroup;
} KERNELS;

/* A struct tcp_sock or udp6_sock begins with it. */
struct sock {
	struct sock_common __sk_common;
	__u16 sk_protocol;
	kuid_t sk_uid;
	struct socket *sk_socket;
	struct sock_cgroup_data sk_cgrp_data;
} KERNELS;

struct bpf_iter_meta {
	struct seq_file *seq;
} KERNELS;

struct bpf_iter__bpf_sk_storage_map {
	struct bpf_iter_meta *meta;
	void *map;
	struct sock *sk;
	void *value;
} KERNELS;

#endif
