/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Short TCP connections, one after the other: both ends in one thread, each in a network namespace of
 * its own.
 *
 *     connections SERVER-NETNS LISTEN-PORT ADDRESS PORT ADDRESSES COUNT
 *
 * Started in the client's namespace. Each connection goes to the PORT of ADDRESS, or of one of the
 * ADDRESSES - 1 after it, drawn at random. A byte is sent and answered by one, and the server closes
 * first: its end is left in TIME-WAIT, and the client's port may be used again at once.
 *
 * A packet between veth devices is worked on by whoever sent it, so that this one thread's time is
 * that of both ends and of all that lies between, unless the kernel hands it to its own thread
 * (ksoftirqd). There is nobody to be waited for or woken.
 *
 * After COUNT connections it goes on until its standard input is closed. Then it prints, as JSON, how many there
 * were, the time they took by the clock and by the processor, and what failed. Says on standard
 * error when it listens and when another 1,000 have been made.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define PATIENCE_MS 5000
#define STEP	    1000

static const char *stage = "start";

static void fail(const char *what)
{
	fprintf(stderr, "connections: %s: %s\n", what, strerror(errno));
	exit(1);
}

static double seconds(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

/* Opens a listener in another namespace; this thread is back in its own then. */
static int listen_in(const char *netns, uint16_t port)
{
	struct sockaddr_in6 any = {.sin6_family = AF_INET6, .sin6_port = htons(port)};
	int there = open(netns, O_RDONLY | O_CLOEXEC);
	int here = open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC);
	int one = 1, zero = 0, sock;

	if (there < 0 || here < 0 || setns(there, CLONE_NEWNET))
		fail(netns);
	sock = socket(AF_INET6, SOCK_STREAM | SOCK_NONBLOCK, 0);
	if (sock < 0 || setsockopt(sock, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)) ||
	    setsockopt(sock, IPPROTO_IPV6, IPV6_V6ONLY, &zero, sizeof(zero)) ||
	    bind(sock, (struct sockaddr *)&any, sizeof(any)) || listen(sock, 16))
		fail("listen");
	if (setns(here, CLONE_NEWNET))
		fail("setns");
	close(there);
	close(here);
	return sock;
}

/* Returns whether the socket is ready in good time. */
static bool wait_for(int sock, short events)
{
	struct pollfd p = {.fd = sock, .events = events};
	int ready = poll(&p, 1, PATIENCE_MS);

	if (!ready)
		errno = ETIMEDOUT;
	return ready > 0;
}

static bool is_connected(int sock)
{
	int err = 0;
	socklen_t size = sizeof(err);

	if (!wait_for(sock, POLLOUT) || getsockopt(sock, SOL_SOCKET, SO_ERROR, &err, &size))
		return false;
	errno = err;
	return !err;
}

/* Accepts; what is left of a connection that failed before is passed over. */
static int accept_from(int listener, in_port_t port)
{
	for (;;) {
		struct sockaddr_in6 peer;
		socklen_t size = sizeof(peer);
		int sock = accept4(listener, (struct sockaddr *)&peer, &size, SOCK_NONBLOCK);

		if (sock >= 0 && peer.sin6_port == port)
			return sock;
		if (sock >= 0)
			close(sock);
		else if ((errno != EAGAIN && errno != ECONNABORTED) || !wait_for(listener, POLLIN))
			return -1;
	}
}

/* Receives a byte (1), or the end (0). */
static bool expect(int sock, ssize_t wanted)
{
	char byte;
	ssize_t got = recv(sock, &byte, 1, 0);

	if (got < 0 && errno == EAGAIN && wait_for(sock, POLLIN))
		got = recv(sock, &byte, 1, 0);
	if (got >= 0 && got != wanted)
		errno = EPROTO;
	return got == wanted;
}

static bool talk(int client, const struct sockaddr_in6 *to, int listener, int *server)
{
	struct sockaddr_in6 own;
	socklen_t size = sizeof(own);

	stage = "connect";
	if (connect(client, (const struct sockaddr *)to, sizeof(*to)) && errno != EINPROGRESS)
		return false;
	if (!is_connected(client))
		return false;
	stage = "accept";
	if (getsockname(client, (struct sockaddr *)&own, &size))
		return false;
	*server = accept_from(listener, own.sin6_port);
	if (*server < 0)
		return false;
	stage = "ask";
	if (send(client, "?", 1, MSG_NOSIGNAL) != 1 || !expect(*server, 1))
		return false;
	stage = "answer";
	if (send(*server, "!", 1, MSG_NOSIGNAL) != 1 || !expect(client, 1))
		return false;
	stage = "close";
	close(*server);
	*server = -1;
	return expect(client, 0);
}

static bool connection(const struct sockaddr_in6 *to, int listener)
{
	int client = socket(AF_INET6, SOCK_STREAM | SOCK_NONBLOCK, 0), server = -1, err;
	bool well;

	if (client < 0)
		fail("socket");
	well = talk(client, to, listener, &server);
	err = errno;
	if (server >= 0)
		close(server);
	close(client);
	errno = err;
	return well;
}

static bool may_end(void)
{
	struct pollfd p = {.events = POLLIN};
	char byte;

	return poll(&p, 1, 0) == 1 && read(0, &byte, 1) <= 0;
}

static uint32_t below(uint64_t *state, uint32_t limit)
{
	*state = *state * 6364136223846793005 + 1442695040888963407;
	return (*state >> 32) * limit >> 32;
}

int main(int argc, char **argv)
{
	struct sockaddr_in6 to = {.sin6_family = AF_INET6};
	long count, done = 0, failed = 0;
	uint32_t first, addresses;
	uint64_t chance;
	double began, began_cpu;
	int listener;

	if (argc != 7 || inet_pton(AF_INET6, argv[3], &to.sin6_addr) != 1) {
		fprintf(stderr,
			"usage: connections SERVER-NETNS LISTEN-PORT ADDRESS PORT ADDRESSES COUNT\n"
			"ADDRESS is IPv6 or ::ffff:IPv4\n");
		return 2;
	}
	to.sin6_port = htons(atoi(argv[4]));
	first = ntohl(to.sin6_addr.s6_addr32[3]);
	addresses = atol(argv[5]);
	count = atol(argv[6]);
	listener = listen_in(argv[1], atoi(argv[2]));
	fprintf(stderr, "listening\n");
	began = seconds(CLOCK_MONOTONIC);
	began_cpu = seconds(CLOCK_PROCESS_CPUTIME_ID);
	chance = began * 1e9;
	while (done < count || !may_end()) {
		for (int i = 0; i < STEP; i++, done++) {
			to.sin6_addr.s6_addr32[3] = htonl(first + below(&chance, addresses));
			if (connection(&to, listener))
				continue;
			if (failed++ < 10)
				fprintf(stderr, "failed: connection %ld: %s: %s\n", done, stage,
					strerror(errno));
		}
		fprintf(stderr, "%ld\n", done);
	}
	printf("{\"connections\": %ld, \"failed\": %ld, \"wall_s\": %.6f, \"cpu_s\": %.6f}\n", done,
	       failed, seconds(CLOCK_MONOTONIC) - began,
	       seconds(CLOCK_PROCESS_CPUTIME_ID) - began_cpu);
	return 0;
}
