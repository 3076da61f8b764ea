/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The decisions as `shunt explain` asks for them: of the same source as the live ones, telling their
 * steps (bpf/step.h) and writing to no map. What is compiled away here, or there, costs no socket
 * anything.
 *
 * Source ranges are the caller's to look at: programs of this type may not use such a map.
 */
#define DRY_RUN 1
#include "bind.h"
#include "excluded.h"

const volatile struct sock_config config = {};

static __always_inline bool was_excluded(const struct sock_try *ctx)
{
	/* Each at a place of its own: "dereference of modified ctx ptr" (6.18, clang 14). */
#pragma unroll
	for (int i = 0; i < CGROUP_LEVELS && ctx->cgroups[i]; i++)
		if (is_excluded_group(ctx->cgroups[i]))
			return true;
	return false;
}

SEC("syscall")
int shunt_sock_try(struct sock_try *ctx)
{
	struct sock_answer answer = {};
	struct sock_ask ask = ctx->ask;
	struct svc_val *service = find_service(&ask, &answer, config.services_mask);

	if (service && config.excludes && was_excluded(ctx))
		answer.reason = SOCK_PASS_CGROUP;
	else if (service)
		choose_of(&answer, &ask, service);
	ctx->answer = answer;
	return 0;
}

SEC("syscall")
int shunt_bind_try(struct bind_try *ctx)
{
	struct bind_ask ask = ctx->ask;

	ctx->reason = try_bind(&ask, config.netns, config.services_mask);
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
