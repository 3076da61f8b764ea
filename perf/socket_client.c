/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a client gets from a service, and what that costs both ends; socket_server.c is the other one.
 *
 *     socket_client requests    PIDS ADDRESS ADDRESSES PORT SECONDS CONNECTIONS
 *     socket_client connections PIDS ADDRESS ADDRESSES PORT SECONDS
 *     socket_client bulk        PIDS ADDRESS ADDRESSES PORT SECONDS BYTES-A-WRITE
 *
 * Each connection is to ADDRESS, or one of the ADDRESSES - 1 after it, drawn at random. `requests` and
 * `connections` ask again as soon as they are answered: on kept connections, or on a new one each time, one
 * after the other, and then the percentiles are of the call of connect() alone, which returns when the
 * connection stands.
 *
 * Prints JSON: how many, how long by the clock, and the processor's time of this process and those of PIDS
 * (comma-separated: the server, and kernel threads that may do a part of the work) in just that time. Every
 * answer is compared with its question; exits with 1 at the first that is not right.
 */
#define _GNU_SOURCE
#include "socket_client.h"

#define MOST_KEPT 1024 /* connections */
#define MOST_PIDS 16

static clockid_t clocks[MOST_PIDS];
static int n_clocks;

static double cpu_s(void)
{
	double sum = seconds(CLOCK_PROCESS_CPUTIME_ID);

	for (int i = 0; i < n_clocks; i++)
		sum += seconds(clocks[i]);
	return sum;
}

static void watch_processes(char *pids)
{
	for (char *pid = strtok(pids, ","); pid; pid = strtok(NULL, ",")) {
		if (n_clocks == MOST_PIDS || clock_getcpuclockid(atoi(pid), &clocks[n_clocks++]))
			fail("PIDS");
	}
}

/* A message of this size comes in one piece: it was sent in one, and is alone on its way. */
static void take_answer(int sock, uint64_t number)
{
	char message[MESSAGE];

	errno = 0;
	if (recv(sock, message, MESSAGE, 0) != MESSAGE ||
	    memcmp(message + 8, &number, sizeof(number))) {
		fail("a wrong answer, or none");
	}
}

static void requests(double for_s, int connections)
{
	double began = 0, began_cpu = 0, until = now_s() + WARM_UP_S, now;
	struct epoll_event events[MOST_KEPT];
	int epoll = epoll_create1(0);
	uint64_t number[MOST_KEPT];
	int socks[MOST_KEPT];
	long done = 0;

	for (int i = 0; i < connections; i++) {
		struct epoll_event event = {.events = EPOLLIN, .data.u32 = i};

		socks[i] = open_one(0);
		if (epoll_ctl(epoll, EPOLL_CTL_ADD, socks[i], &event))
			fail("epoll_ctl");
		ask(socks[i], 'E', number[i] = (uint64_t)i << 32);
	}
	for (;;) {
		int ready = epoll_wait(epoll, events, connections, PATIENCE_S * 1000);

		if (ready <= 0)
			fail("no answer");
		for (int i = 0; i < ready; i++, done++) {
			uint32_t who = events[i].data.u32;

			take_answer(socks[who], number[who]);
			ask(socks[who], 'E', ++number[who]);
		}
		now = now_s();
		if (now < until)
			continue;
		if (began)
			break;
		began = now;
		until = began + for_s;
		began_cpu = cpu_s();
		done = 0;
	}
	print_result(done, now - began, cpu_s() - began_cpu);
}

static void connections(double for_s)
{
	double began = 0, began_cpu = 0, until = now_s() + WARM_UP_S;
	long done = 0;

	for (;;) {
		double now = now_s();
		int sock = open_one(0);

		sample(now_s() - now);
		ask(sock, 'E', done);
		take_answer(sock, done);
		close(sock);
		done++;
		now = now_s();
		if (now < until)
			continue;
		if (began) {
			print_result(done, now - began, cpu_s() - began_cpu);
			return;
		}
		began = now;
		until = began + for_s;
		began_cpu = cpu_s();
		done = n_samples = 0;
	}
}

static void bulk(double for_s, size_t size)
{
	double began = 0, began_cpu = 0, until = now_s() + WARM_UP_S, now;
	char *data = malloc(size);
	uint64_t sent = 0, before = 0, taken;
	int sock = open_one(0);

	memset(data, 'B', size);
	do {
		/* A blocking socket takes all of it. */
		if (send(sock, data, size, MSG_NOSIGNAL) != (ssize_t)size)
			fail("send");
		sent += size;
		now = now_s();
		if (!began && now >= until) {
			began = now;
			until = began + for_s;
			began_cpu = cpu_s();
			before = sent;
		}
	} while (!began || now < until);
	/* What is still queued takes its time, too. */
	shutdown(sock, SHUT_WR);
	errno = 0;
	if (recv(sock, &taken, sizeof(taken), MSG_WAITALL) != sizeof(taken) || taken != sent)
		fail("bytes were lost");
	print_result(sent - before, now_s() - began, cpu_s() - began_cpu);
	free(data);
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";
	bool counted = !strcmp(what, "requests") || !strcmp(what, "bulk");
	long number = argc == 8 ? atol(argv[7]) : 0;
	double for_s;

	if (argc != 7 + counted || (counted && number < 1) ||
	    (!counted && strcmp(what, "connections")) ||
	    (!strcmp(what, "requests") && number > MOST_KEPT)) {
		fprintf(stderr, "usage: socket_client requests|connections|bulk PIDS ADDRESS"
				" ADDRESSES PORT SECONDS [CONNECTIONS|BYTES-A-WRITE]\n");
		return 2;
	}
	watch_processes(argv[2]);
	for_s = read_arguments(argv + 3);
	if (!strcmp(what, "requests"))
		requests(for_s, number);
	else if (!strcmp(what, "bulk"))
		bulk(for_s, number);
	else
		connections(for_s);
	return 0;
}
