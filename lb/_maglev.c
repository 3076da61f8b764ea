/* SPDX-License-Identifier: Apache-2.0 */
/* What maglev.py calls: arrays in and out through the buffer protocol, and the errors. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "maglev.h"

/* A ValueError with three arguments: what, why, fix. `what` is a format for one number. */
static PyObject *refuse(const char *what, Py_ssize_t number, const char *why, const char *fix)
{
	PyObject *text = PyUnicode_FromFormat(what, number);
	PyObject *args = text ? Py_BuildValue("(Nss)", text, why, fix) : NULL;

	if (args)
		PyErr_SetObject(PyExc_ValueError, args);
	Py_XDECREF(args);
	return NULL;
}

static PyObject *refuse_problem(enum problem problem, Py_ssize_t number)
{
	switch (problem) {
	case NO_BACKEND:
		return refuse("a table of %zd slots has no backend", number,
			      "every slot needs an owner", "give at least one backend");
	case CROWDED:
		return refuse("a table of %zd slots has more backends than slots", number,
			      "a backend without a slot would get no traffic",
			      "take more slots: 1 << log2_slots(len(backends))");
	case BAD_SLOTS:
		return refuse("a table can't have %zd slots", number,
			      "preferences visit every slot only if the number of slots is a power "
			      "of two (up to 2**30) or a prime below that",
			      "take 1 << log2_slots(len(backends))");
	case BAD_WEIGHT:
		return refuse(
			"backend %zd has weight 0", number,
			"a weight is a share of the slots, and every backend gets at least one",
			"give a weight from 1, or leave the backend out");
	case TWICE:
		return refuse("backend %zd is there twice", number,
			      "an identity (or its hash) may stand once in a table",
			      "leave one out, and give the other the sum of the weights");
	default:
		return PyErr_NoMemory();
	}
}

static int get_buffer(PyObject *from, Py_buffer *to, int flags, Py_ssize_t itemsize,
		      const char *what)
{
	const char *format;

	if (PyObject_GetBuffer(from, to, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | flags))
		return -1;
	format = to->format ? to->format : "B";
	if (to->itemsize == itemsize && strchr("ILQ", format[0]) && !format[1])
		return 0;
	PyErr_Format(PyExc_TypeError, "%s wants unsigned integers of %zd bytes, not '%s'", what,
		     itemsize, format);
	PyBuffer_Release(to);
	return -1;
}

/* Copies what it reads: the GIL is released later, and the caller's arrays may change then. */
static PyObject *fill_buffers(const Py_buffer *hashes, const Py_buffer *weights,
			      const Py_buffer *out, int claim)
{
	Py_ssize_t n = weights->len / 4, slots = out->len / 4;
	const uint64_t(*hash)[2] = hashes->buf;
	const uint32_t *weight = weights->buf;
	struct backend *b;
	enum problem problem;
	uint32_t culprit = 0;

	if (hashes->len != n * 16) {
		PyErr_Format(PyExc_TypeError,
			     "hashes wants two words for each of %zd weights, "
			     "not %zd in all",
			     n, hashes->len / 8);
		return NULL;
	}
	if (slots < 1 || slots > MAX_SLOTS || ((slots & (slots - 1)) && !is_prime(slots)))
		return refuse_problem(BAD_SLOTS, slots);
	if (!n || n > slots)
		return refuse_problem(n ? CROWDED : NO_BACKEND, slots);
	b = malloc(n * sizeof(*b));
	if (!b)
		return PyErr_NoMemory();
	for (Py_ssize_t i = 0; i < n; i++) {
		memcpy(b[i].hash, hash[i], sizeof(b[i].hash));
		b[i].index = i;
		b[i].weight = weight[i];
	}
	Py_BEGIN_ALLOW_THREADS problem = fill(b, n, slots, out->buf, claim, &culprit);
	Py_END_ALLOW_THREADS free(b);
	if (problem != OK)
		return refuse_problem(problem, culprit);
	Py_RETURN_NONE;
}

static PyObject *maglev_fill(PyObject *Py_UNUSED(self), PyObject *args)
{
	PyObject *objects[3], *result = NULL;
	Py_buffer hashes, weights, out;
	int claim;

	if (!PyArg_ParseTuple(args, "OOOp:fill", &objects[0], &objects[1], &objects[2], &claim))
		return NULL;
	if (get_buffer(objects[0], &hashes, 0, 8, "hashes"))
		return NULL;
	if (!get_buffer(objects[1], &weights, 0, 4, "weights")) {
		if (!get_buffer(objects[2], &out, PyBUF_WRITABLE, 4, "out")) {
			result = fill_buffers(&hashes, &weights, &out, claim);
			PyBuffer_Release(&out);
		}
		PyBuffer_Release(&weights);
	}
	PyBuffer_Release(&hashes);
	return result;
}

static PyMethodDef methods[] = {
	{"fill", maglev_fill, METH_VARARGS, "fill(hashes, weights, out, claim); see maglev.py"},
	{NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
	PyModuleDef_HEAD_INIT,
	.m_name = "_maglev",
	.m_methods = methods,
};

PyMODINIT_FUNC PyInit__maglev(void)
{
	return PyModuleDef_Init(&module);
}
