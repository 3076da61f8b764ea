/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Requests at a constant rate, free of coordinated omission: on kept connections, or on one for each.
 *
 *     socket_paced ADDRESS ADDRESSES PORT SECONDS RATE KEPT
 *
 * At each tick of a clock a request is sent, whatever became of those before: on the next of KEPT
 * connections, also if that one is still to be answered; with KEPT 0 on a new one, closed when answered.
 * Its latency begins at the tick: what is sent late, since this program was held up or too much was
 * unanswered, counts as slow. It never sleeps, so that it sends as exactly as it can; so its processor's
 * time says nothing, and is not told.
 *
 * Prints JSON, as socket_client does. Exits with 1 at the first answer that is not right.
 */
#define _GNU_SOURCE
#include "socket_client.h"

#define MOST_OPEN  512	/* connections */
#define MOST_FILES 1024 /* descriptors */
#define MOST_ASKED 512	/* requests unanswered on one connection; a power of two */

/* By descriptor. */
static struct open_connection {
	struct {
		uint64_t number;
		double due_s;
	} asked[MOST_ASKED];
	uint32_t head, tail;
	char part[MESSAGE]; /* of an answer, the first `have` bytes */
	int have;
	bool is_connected;
} open_connections[MOST_FILES];
static uint64_t begun, ended, unmeasured;
static bool is_kept;
static int epoll;

static void watch(int sock, int operation, uint32_t events)
{
	struct epoll_event event = {.events = events, .data.fd = sock};

	if (sock >= MOST_FILES || epoll_ctl(epoll, operation, sock, &event))
		fail("epoll_ctl");
}

/* Returns false if this one has to wait, since it is too much as it is. */
static bool begin(int kept, double due_s)
{
	struct open_connection *c;
	int sock = kept;

	if (!is_kept && begun - ended >= MOST_OPEN)
		return false;
	if (!is_kept) {
		sock = open_one(SOCK_NONBLOCK);
		watch(sock, EPOLL_CTL_ADD, EPOLLOUT);
		open_connections[sock] = (struct open_connection){};
	}
	c = &open_connections[sock];
	if (c->tail - c->head == MOST_ASKED)
		return false;
	c->asked[c->tail % MOST_ASKED].number = begun;
	c->asked[c->tail++ % MOST_ASKED].due_s = due_s;
	if (is_kept)
		ask(sock, 'E', begun);
	return true;
}

static void ask_when_connected(int sock, struct open_connection *c)
{
	int err = 0;
	socklen_t size = sizeof(err);

	if (getsockopt(sock, SOL_SOCKET, SO_ERROR, &err, &size))
		fail("connect");
	errno = err;
	if (err)
		fail("connect");
	c->is_connected = true;
	ask(sock, 'E', c->asked[0].number);
	watch(sock, EPOLL_CTL_MOD, EPOLLIN);
}

static void take(int sock, struct open_connection *c)
{
	ssize_t got;

	for (;;) {
		uint64_t number = c->asked[c->head % MOST_ASKED].number;

		errno = 0;
		got = recv(sock, c->part + c->have, MESSAGE - c->have, MSG_DONTWAIT);
		if (got < 0 && errno == EAGAIN)
			return;
		if (got <= 0)
			fail("no answer");
		c->have += got;
		if (c->have < MESSAGE)
			continue;
		if (memcmp(c->part + 8, &number, sizeof(number)))
			fail("a wrong answer");
		if (number >= unmeasured)
			sample(now_s() - c->asked[c->head % MOST_ASKED].due_s);
		ended++;
		c->head++;
		c->have = 0;
		if (is_kept)
			continue;
		close(sock);
		return;
	}
}

static void paced(double for_s, double rate, int kept)
{
	struct epoll_event events[MOST_OPEN];
	int socks[MOST_OPEN];
	uint64_t total;
	double began, progress;

	for (int i = 0; i < kept; i++) {
		socks[i] = open_one(0);
		watch(socks[i], EPOLL_CTL_ADD, EPOLLIN);
		open_connections[socks[i]].is_connected = true;
	}
	unmeasured = WARM_UP_S * rate;
	total = unmeasured + for_s * rate;
	began = progress = now_s();
	while (ended < total) {
		uint64_t before = ended;
		double due_s = began + begun / rate;
		int ready;

		if (begun < total && now_s() >= due_s &&
		    begin(is_kept ? socks[begun % kept] : 0, due_s))
			begun++;
		ready = epoll_wait(epoll, events, MOST_OPEN, 0);
		for (int i = 0; i < ready; i++) {
			struct open_connection *c = &open_connections[events[i].data.fd];

			if (c->is_connected)
				take(events[i].data.fd, c);
			else
				ask_when_connected(events[i].data.fd, c);
		}
		if (ended > before)
			progress = now_s();
		errno = ETIMEDOUT;
		if (now_s() - progress > PATIENCE_S)
			fail("no answer");
	}
	print_result(n_samples, now_s() - began - unmeasured / rate, 0);
}

int main(int argc, char **argv)
{
	double rate = argc == 7 ? atof(argv[5]) : 0;
	int kept = argc == 7 ? atoi(argv[6]) : -1;

	if (rate <= 0 || kept < 0 || kept > MOST_OPEN) {
		fprintf(stderr, "usage: socket_paced ADDRESS ADDRESSES PORT SECONDS RATE KEPT\n");
		return 2;
	}
	is_kept = kept;
	epoll = epoll_create1(0);
	paced(read_arguments(argv + 1), rate, kept);
	return 0;
}
