/* SPDX-License-Identifier: Apache-2.0 */
/* What routes.py calls: some requests for routes in one send, and their answers. */
#define _GNU_SOURCE /* recvmmsg */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <linux/rtnetlink.h>
#include <stddef.h>
#include <string.h>
#include <sys/socket.h>

/* Each answer takes some 4 KiB of the receive buffer, whose default is 208 KiB. */
#define AT_ONCE 16
/* The kernel makes none longer: NLMSG_GOODSIZE. */
#define ANSWER_BYTES 8192

/* On the wire without a gap, with 4 or 16 bytes of the address. */
struct request {
	struct nlmsghdr header;
	struct rtmsg route;
	struct rtattr attribute;
	char address[16];
};

struct answer {
	_Alignas(struct nlmsghdr) char data[ANSWER_BYTES];
};

/* Each after the other; returns their bytes, or -1 with an exception. */
static Py_ssize_t write_requests(char *to, PyObject *addresses, Py_ssize_t n, __u32 sequence)
{
	char *end = to;

	for (Py_ssize_t i = 0; i < n; i++) {
		PyObject *address = PySequence_GetItem(addresses, i);
		Py_ssize_t length = address ? PyBytes_Size(address) : -1;
		struct request r = {
			.header = {offsetof(struct request, address) + length, RTM_GETROUTE,
				   NLM_F_REQUEST, sequence + i, 0},
			.route = {.rtm_family = length == 4 ? AF_INET : AF_INET6,
				  .rtm_dst_len = length * 8},
			.attribute = {RTA_LENGTH(length), RTA_DST},
		};

		if (length == 4 || length == 16) {
			memcpy(r.address, PyBytes_AsString(address), length);
			memcpy(end, &r, r.header.nlmsg_len);
			end += r.header.nlmsg_len;
		} else if (!PyErr_Occurred()) {
			PyErr_Format(PyExc_ValueError, "an address has 4 or 16 bytes, not %zd",
				     length);
		}
		Py_XDECREF(address);
		if (PyErr_Occurred())
			return -1;
	}
	return end - to;
}

/* Waits for as many datagrams; returns 0 or an errno, and how many there are in *got. */
static int receive(int fd, struct mmsghdr *messages, int n, int *got)
{
	*got = 0;
	while (*got < n) {
		int more = recvmmsg(fd, messages + *got, n - *got, 0, NULL);

		if (more >= 0)
			*got += more;
		else if (errno != EINTR)
			return errno;
	}
	return 0;
}

static int exchange(int fd, const char *requests, Py_ssize_t length, struct mmsghdr *messages,
		    int n, int *got)
{
	*got = 0;
	if (send(fd, requests, length, 0) < 0)
		return errno;
	return receive(fd, messages, n, got);
}

/* struct rtmsg and its attributes but the destination, which are the same for many; in place. */
static Py_ssize_t leave_out_destination(struct nlmsghdr *header)
{
	int rest = NLMSG_PAYLOAD(header, sizeof(struct rtmsg));
	struct rtattr *attribute = RTM_RTA(NLMSG_DATA(header));
	char *end = (char *)attribute;

	while (RTA_OK(attribute, rest)) {
		struct rtattr *next = RTA_NEXT(attribute, rest);
		int length = (char *)next - (char *)attribute;

		if (attribute->rta_type != RTA_DST) {
			memmove(end, attribute, length);
			end += length;
		}
		attribute = next;
	}
	return end - (char *)NLMSG_DATA(header);
}

/* A new reference: bytes, the one of the answer before if equal, or the errno that it says. */
static PyObject *read_answer(struct nlmsghdr *header, PyObject *before)
{
	Py_ssize_t length;

	if (header->nlmsg_type == NLMSG_ERROR)
		return PyLong_FromLong(-((struct nlmsgerr *)NLMSG_DATA(header))->error);
	length = leave_out_destination(header);
	if (before && PyBytes_Check(before) && PyBytes_Size(before) == length &&
	    !memcmp(PyBytes_AsString(before), NLMSG_DATA(header), length))
		return Py_NewRef(before);
	return PyBytes_FromStringAndSize(NLMSG_DATA(header), length);
}

/* What a datagram answers: an index below n, or -1 if it is none of our answers. */
static int index_of(const struct mmsghdr *message, const struct nlmsghdr *header, __u32 first,
		    int n)
{
	size_t least =
		header->nlmsg_type == NLMSG_ERROR ? sizeof(struct nlmsgerr) : sizeof(struct rtmsg);

	if (message->msg_hdr.msg_flags & MSG_TRUNC || !NLMSG_OK(header, message->msg_len) ||
	    header->nlmsg_len < NLMSG_LENGTH(least) || header->nlmsg_seq - first >= (__u32)n ||
	    (header->nlmsg_type != NLMSG_ERROR && header->nlmsg_type != RTM_NEWROUTE))
		return -1;
	return header->nlmsg_seq - first;
}

/* *error: 0 or an errno, then that of whoever has no answer. */
static PyObject *list_answers(struct answer *data, const struct mmsghdr *messages, int got,
			      __u32 first, int n, int *error)
{
	PyObject *found[AT_ONCE] = {}, *before = NULL, *list;
	int failed = 0;

	for (int i = 0; i < got && !failed; i++) {
		struct nlmsghdr *header = (struct nlmsghdr *)data[i].data;
		int at = index_of(&messages[i], header, first, n);

		if (at < 0 || found[at]) {
			*error = EPROTO;
			break;
		}
		before = found[at] = read_answer(header, before);
		failed = !found[at];
	}
	list = failed ? NULL : PyList_New(n);
	for (int i = 0; i < n; i++) {
		if (list && !found[i] && !(found[i] = PyLong_FromLong(*error)))
			Py_CLEAR(list);
		if (!list || PyList_SetItem(list, i, found[i]))
			Py_XDECREF(found[i]);
	}
	return list;
}

static PyObject *routes_ask(PyObject *Py_UNUSED(self), PyObject *args)
{
	char requests[AT_ONCE * sizeof(struct request)];
	struct answer data[AT_ONCE];
	struct mmsghdr messages[AT_ONCE] = {};
	struct iovec parts[AT_ONCE];
	PyObject *addresses, *list;
	unsigned int sequence;
	Py_ssize_t n, length;
	int fd, got, error;

	if (!PyArg_ParseTuple(args, "iIO:ask", &fd, &sequence, &addresses) ||
	    (n = PySequence_Size(addresses)) < 0)
		return NULL;
	if (!n || n > AT_ONCE)
		return PyErr_Format(PyExc_ValueError, "from 1 to %d addresses at once, not %zd",
				    AT_ONCE, n);
	length = write_requests(requests, addresses, n, sequence);
	if (length < 0)
		return NULL;
	for (int i = 0; i < n; i++) {
		parts[i] = (struct iovec){data[i].data, ANSWER_BYTES};
		messages[i].msg_hdr.msg_iov = &parts[i];
		messages[i].msg_hdr.msg_iovlen = 1;
	}
	Py_BEGIN_ALLOW_THREADS;
	error = exchange(fd, requests, length, messages, n, &got);
	Py_END_ALLOW_THREADS;
	list = list_answers(data, messages, got, sequence, n, &error);
	return list ? Py_BuildValue("Ni", list, error) : NULL;
}

static PyMethodDef methods[] = {
	{"ask", routes_ask, METH_VARARGS, "ask(fd, sequence, addresses); see _routes.pyi"},
	{NULL, NULL, 0, NULL},
};

static int add_numbers(PyObject *module)
{
	return PyModule_AddIntMacro(module, AT_ONCE);
}

static PyModuleDef_Slot slots[] = {
	{Py_mod_exec, add_numbers},
	{0, NULL},
};

static struct PyModuleDef module = {
	PyModuleDef_HEAD_INIT,
	.m_name = "_routes",
	.m_methods = methods,
	.m_slots = slots,
};

PyMODINIT_FUNC PyInit__routes(void)
{
	return PyModuleDef_Init(&module);
}
