/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What socket_client.c and socket_paced.c share: connections to services, questions and their answers, and
 * the times of both by the clock and by the processor. Errors end the program.
 */
#ifndef SOCKET_CLIENT_H
#define SOCKET_CLIENT_H

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MESSAGE	     64
#define MOST_SAMPLES (1 << 20)
#define WARM_UP_S    0.1
#define PATIENCE_S   10
#define SYNS	     2 /* again, after 1 and 3 seconds */

static struct sockaddr_in to = {.sin_family = AF_INET};
static uint32_t first, addresses;
static uint32_t samples[MOST_SAMPLES]; /* ns */
static long n_samples;

static void fail(const char *what)
{
	fprintf(stderr, "socket_client: %s: %s\n", what, strerror(errno));
	exit(1);
}

static double seconds(clockid_t clock)
{
	struct timespec t;

	if (clock_gettime(clock, &t))
		fail("clock of a process");
	return t.tv_sec + t.tv_nsec / 1e9;
}

static double now_s(void)
{
	return seconds(CLOCK_MONOTONIC);
}

static void sample(double took_s)
{
	if (n_samples < MOST_SAMPLES)
		samples[n_samples++] = took_s * 1e9;
}

static int ascending(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return (x > y) - (x < y);
}

/* The smallest sample that this part of them does not exceed. Units: microseconds. */
static double quantile(double part)
{
	long i = part * n_samples;

	return n_samples ? samples[i < n_samples ? i : n_samples - 1] / 1e3 : 0;
}

static void print_result(long count, double wall_s, double cpu)
{
	qsort(samples, n_samples, sizeof(samples[0]), ascending);
	printf("{\"count\": %ld, \"wall_s\": %.6f, \"cpu_s\": %.6f, \"p50_us\": %.3f, \"p99_us\": %.3f,"
	       " \"p999_us\": %.3f}\n",
	       count, wall_s, cpu, quantile(.5), quantile(.99), quantile(.999));
}

/* Returns the socket; it may be on its way if `flags` has SOCK_NONBLOCK. */
static int open_one(int flags)
{
	struct timeval patience = {.tv_sec = PATIENCE_S};
	int sock = socket(AF_INET, SOCK_STREAM | flags, 0), one = 1, syns = SYNS;

	if (sock < 0 || setsockopt(sock, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)) ||
	    setsockopt(sock, IPPROTO_TCP, TCP_SYNCNT, &syns, sizeof(syns)) ||
	    setsockopt(sock, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience)))
		fail("socket");
	to.sin_addr.s_addr = htonl(first + random() % addresses);
	if (connect(sock, (struct sockaddr *)&to, sizeof(to)) && errno != EINPROGRESS)
		fail("connect");
	return sock;
}

static void ask(int sock, char kind, uint64_t number)
{
	char message[MESSAGE] = {kind};

	memcpy(message + 8, &number, sizeof(number));
	if (send(sock, message, MESSAGE, MSG_NOSIGNAL) != MESSAGE)
		fail("send");
}

/* ADDRESS ADDRESSES PORT SECONDS, which both are told. Returns SECONDS. */
static double read_arguments(char **argv)
{
	if (inet_pton(AF_INET, argv[0], &to.sin_addr) != 1)
		fail("ADDRESS");
	first = ntohl(to.sin_addr.s_addr);
	addresses = atol(argv[1]);
	to.sin_port = htons(atoi(argv[2]));
	srandom(now_s() * 1e6);
	return atof(argv[3]);
}

#endif
