/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What a user's TC program does with the mark of a hook: a packet's own mark, from its metadata. */
#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>

SEC("tc")
int take_mark(struct __sk_buff *skb)
{
	__u32 *mark = (void *)(long)skb->data_meta;

	if ((void *)(mark + 1) <= (void *)(long)skb->data)
		skb->mark = *mark;
	return TC_ACT_OK;
}
