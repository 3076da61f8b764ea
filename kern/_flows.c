/* SPDX-License-Identifier: Apache-2.0 */
/* What flows.py calls: bpf/flow_table.h on the mapped memory of map flows, beside the programs. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <linux/in.h>

#include "abi.h"

/* The caller's indexes are within the table. */
static inline struct flow_line *line_at(void *table, __u32 index)
{
	return (struct flow_line *)table + index;
}

#include "flow_table.h"

struct table {
	Py_buffer buffer;
	__u32 mask;
};

static int get_buffer(PyObject *from, Py_buffer *to, int flags, Py_ssize_t itemsize,
		      const char *what)
{
	if (PyObject_GetBuffer(from, to, PyBUF_C_CONTIGUOUS | flags))
		return -1;
	if (to->itemsize == itemsize)
		return 0;
	PyErr_Format(PyExc_TypeError, "%s wants elements of %zd bytes, not %zd", what, itemsize,
		     to->itemsize);
	PyBuffer_Release(to);
	return -1;
}

static int get_table(PyObject *from, struct table *t)
{
	Py_ssize_t lines;

	if (get_buffer(from, &t->buffer, PyBUF_WRITABLE, sizeof(struct flow_line), "lines"))
		return -1;
	lines = t->buffer.len / (Py_ssize_t)sizeof(struct flow_line);
	t->mask = lines - 1;
	if (lines > 0 && lines <= 1LL << 32 && !(lines & (lines - 1)))
		return 0;
	PyErr_Format(PyExc_TypeError, "a table has a power of two of lines, not %zd", lines);
	PyBuffer_Release(&t->buffer);
	return -1;
}

static void delete_all(const struct table *t, const __u32 *index, const __u64 *word, char *deleted,
		       Py_ssize_t n)
{
	for (Py_ssize_t i = 0; i < n; i++) {
		struct flow_line *line = line_at(t->buffer.buf, index[i] & t->mask);
		struct flow_at at = {line, word[i], (index[i] - line->hash) & t->mask};

		/* A line that holds no flow any more may not look like one that does. */
		deleted[i] = flow_state(word[i]) >= FLOW_OPENING && at.distance < FLOW_REACH &&
			     flow_delete(t->buffer.buf, t->mask, &at, FLOW_BY_AGENT);
	}
}

static PyObject *flows_delete(PyObject *Py_UNUSED(self), PyObject *args)
{
	Py_buffer index, words, deleted;
	PyObject *objects[4];
	struct table t;

	if (!PyArg_ParseTuple(args, "OOOO:delete", &objects[0], &objects[1], &objects[2],
			      &objects[3]) ||
	    get_table(objects[0], &t))
		return NULL;
	if (!get_buffer(objects[1], &index, 0, sizeof(__u32), "index")) {
		if (!get_buffer(objects[2], &words, 0, sizeof(__u64), "words")) {
			if (!get_buffer(objects[3], &deleted, PyBUF_WRITABLE, 1, "deleted")) {
				if (index.len == 4 * deleted.len && words.len == 8 * deleted.len)
					delete_all(&t, index.buf, words.buf, deleted.buf,
						   deleted.len);
				else
					PyErr_SetString(PyExc_TypeError, "lengths differ");
				PyBuffer_Release(&deleted);
			}
			PyBuffer_Release(&words);
		}
		PyBuffer_Release(&index);
	}
	PyBuffer_Release(&t.buffer);
	if (PyErr_Occurred())
		return NULL;
	Py_RETURN_NONE;
}

static PyObject *flows_insert(PyObject *Py_UNUSED(self), PyObject *args)
{
	PyObject *objects[2], *result = NULL;
	Py_ssize_t counts[FLOW_NO_ROOM + 1] = {};
	Py_buffer from;
	struct table t;

	if (!PyArg_ParseTuple(args, "OO:insert", &objects[0], &objects[1]) ||
	    get_table(objects[0], &t))
		return NULL;
	if (!get_buffer(objects[1], &from, 0, sizeof(struct flow_line), "flows")) {
		const struct flow_line *flow = from.buf;

		for (Py_ssize_t i = 0; i < from.len / (Py_ssize_t)sizeof(*flow); i++) {
			__u64 word = flow[i].word;

			counts[flow_insert(t.buffer.buf, t.mask, &flow[i].key, flow[i].hash,
					   flow[i].isn, &word, FLOW_BY_AGENT)]++;
		}
		result = Py_BuildValue("nn", counts[FLOW_INSERTED], counts[FLOW_NO_ROOM]);
		PyBuffer_Release(&from);
	}
	PyBuffer_Release(&t.buffer);
	return result;
}

static PyObject *flows_mend(PyObject *Py_UNUSED(self), PyObject *lines)
{
	Py_ssize_t freed = 0;
	struct table t;

	if (get_table(lines, &t))
		return NULL;
	for (Py_ssize_t i = 0; i <= t.mask; i++) {
		struct flow_line *line = line_at(t.buffer.buf, i);
		__u64 word = READ_ONCE(line->word);
		__u32 distance = (i - line->hash) & t.mask;

		if (word != flow_claim_word(FLOW_BY_AGENT, FLOW_CLAIMED) &&
		    word != flow_claim_word(FLOW_BY_AGENT, FLOW_CLEARING))
			continue;
		if (distance < FLOW_REACH)
			flow_free(t.buffer.buf, t.mask, line, distance);
		else /* it was claimed and not written yet */
			flow_publish(line, 0);
		freed++;
	}
	PyBuffer_Release(&t.buffer);
	return PyLong_FromSsize_t(freed);
}

static PyMethodDef methods[] = {
	{"delete", flows_delete, METH_VARARGS, "delete(lines, index, words); see flows.py"},
	{"insert", flows_insert, METH_VARARGS, "insert(lines, flows); see flows.py"},
	{"mend", flows_mend, METH_O, "mend(lines); see flows.py"},
	{NULL, NULL, 0, NULL},
};

/* bpf/abi.h's numbers, for NumPy. */
static int add_numbers(PyObject *module)
{
	return PyModule_AddIntConstant(module, "OPENING", FLOW_OPENING) ||
	       PyModule_AddIntConstant(module, "CONFIRMED", FLOW_CONFIRMED) ||
	       PyModule_AddIntConstant(module, "CLOSING", FLOW_CLOSING) ||
	       PyModule_AddIntConstant(module, "STATE_SHIFT", FLOW_STATE_SHIFT) ||
	       PyModule_AddIntConstant(module, "STATE_MASK", FLOW_STATE_MASK) ||
	       PyModule_AddIntConstant(module, "SEEN_SHIFT", FLOW_SEEN_SHIFT) ||
	       PyModule_AddIntConstant(module, "TICK_SHIFT", FLOW_TICK_SHIFT) ||
	       PyModule_AddIntConstant(module, "REACH", FLOW_REACH);
}

static PyModuleDef_Slot slots[] = {
	{Py_mod_exec, add_numbers},
	{0, NULL},
};

static struct PyModuleDef module = {
	PyModuleDef_HEAD_INIT,
	.m_name = "_flows",
	.m_methods = methods,
	.m_slots = slots,
};

PyMODINIT_FUNC PyInit__flows(void)
{
	return PyModuleDef_Init(&module);
}
