/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* A hook that looks beyond its view. */
#include "shunt_hook.h"

int hook(struct hook_view *view)
{
	return view->data[view->len] == 1 ? SHUNT_DROP : SHUNT_PASS;
}
