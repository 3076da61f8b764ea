/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The other end of socket_client.c: as little as a server can do, so that what lies between the two
 * is most of what is measured.
 *
 *     socket_server PORT
 *
 * Listens on every address, says so on standard output, and serves until it is killed. A connection's
 * first byte says what it is for:
 *
 *     E   each message comes back as it is, until the client closes
 *     B   bytes are taken until the client shuts down; their number comes back, 8 bytes of the host's order
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define EVENTS	64
#define FILES	65536
#define BACKLOG 4096

/* By descriptor: what a connection is for, 0 if it has not said so, and what it has sent. */
static char purpose[FILES];
static uint64_t taken[FILES];
static char buffer[1 << 18];

static void fail(const char *what)
{
	fprintf(stderr, "socket_server: %s: %s\n", what, strerror(errno));
	exit(1);
}

static int listen_on(uint16_t port)
{
	struct sockaddr_in any = {.sin_family = AF_INET, .sin_port = htons(port)};
	int sock = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
	int one = 1;

	if (sock < 0 || setsockopt(sock, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)) ||
	    bind(sock, (struct sockaddr *)&any, sizeof(any)) || listen(sock, BACKLOG))
		fail("listen");
	return sock;
}

static void accept_all(int epoll, int listener)
{
	int sock, one = 1;

	while ((sock = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
		struct epoll_event event = {.events = EPOLLIN, .data.fd = sock};

		if (sock >= FILES) {
			fprintf(stderr, "socket_server: too many connections\n");
			exit(1);
		}
		purpose[sock] = 0;
		taken[sock] = 0;
		/* A client may be gone already. */
		setsockopt(sock, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
		if (epoll_ctl(epoll, EPOLL_CTL_ADD, sock, &event))
			fail("epoll_ctl");
	}
}

/* Whoever does not read what it asked for is let go. */
static void serve(int sock)
{
	ssize_t got = recv(sock, buffer, sizeof(buffer), 0);

	if (got < 0 && errno == EAGAIN)
		return;
	if (got > 0 && !purpose[sock])
		purpose[sock] = buffer[0];
	if (got > 0)
		taken[sock] += got;
	if (got > 0 && purpose[sock] == 'B')
		return;
	if (got > 0 && send(sock, buffer, got, MSG_NOSIGNAL) == got)
		return;
	if (!got && purpose[sock] == 'B')
		send(sock, &taken[sock], sizeof(taken[sock]), MSG_NOSIGNAL);
	close(sock);
}

int main(int argc, char **argv)
{
	struct epoll_event events[EVENTS] = {{.events = EPOLLIN}};
	int epoll = epoll_create1(0), listener;

	if (argc != 2) {
		fprintf(stderr, "usage: socket_server PORT\n");
		return 2;
	}
	listener = listen_on(atoi(argv[1]));
	events[0].data.fd = listener;
	if (epoll < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &events[0]))
		fail("epoll");
	puts("listening");
	fflush(stdout);
	for (;;) {
		int ready = epoll_wait(epoll, events, EVENTS, -1);

		if (ready < 0 && errno != EINTR)
			fail("epoll_wait");
		for (int i = 0; i < ready; i++) {
			if (events[i].data.fd == listener)
				accept_all(epoll, listener);
			else
				serve(events[i].data.fd);
		}
	}
}
