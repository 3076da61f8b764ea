/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Memory that others write at the same time: the compiler must not assume what it holds. */
#ifndef SHUNT_MEMORY_H
#define SHUNT_MEMORY_H

#define READ_ONCE(x)	 (*(volatile typeof(x) *)&(x))
#define WRITE_ONCE(x, v) (*(volatile typeof(x) *)&(x) = (v))

#endif
