/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The smallest hook that does something. */
#include "shunt_hook.h"

int hook(struct hook_view *view)
{
	(void)view;
	return SHUNT_DROP;
}
