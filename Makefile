# SPDX-License-Identifier: Apache-2.0
# `make` lists the targets. Whatever is written into the checkout is written by its owner
# (tools/as-owner), so `sudo make test` leaves nothing of root's behind.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --no-print-directory

AS_OWNER := tools/as-owner
PYTHON := build/venv/bin/python
TRIPLET := $(shell uname -m)-linux-gnu
BPF_ARCH := $(patsubst aarch64,arm64,$(patsubst x86_64,x86,$(shell uname -m)))

BPF_SOURCES := $(wildcard xdp/*.bpf.c tc/*.bpf.c sockops/*.bpf.c perf/*.bpf.c examples/*.bpf.c \
	tests/*.bpf.c tests/*/*.bpf.c)
BPF_OBJECTS := $(BPF_SOURCES:.c=.o)
C_SOURCES := $(wildcard bpf/*.h xdp/*.c xdp/*.h tc/*.c tc/*.h sockops/*.c sockops/*.h lb/*.c lb/*.h kern/*.c \
	perf/*.c perf/*.h examples/*.c tests/*.bpf.c tests/*/*.bpf.c)

CLIENTS := $(addprefix build/,connections socket_server socket_client socket_paced)

# -mcpu=v3 (32-bit registers' jumps, atomics) is what every supported kernel takes; the
# prefix map keeps the line information, and so the object, the same in every directory.
# Headers are summed and compared as words, so no strict aliasing, as in the kernel.
BPF_CFLAGS := -O2 -g -target bpf -mcpu=v3 -fno-strict-aliasing -D__TARGET_ARCH_$(BPF_ARCH) \
	-Ibpf -Ixdp -Itc -isystem /usr/include/$(TRIPLET) -ffile-prefix-map=$(CURDIR)=. \
	-Wall -Wextra -Werror

# Root leaves no caches in the checkout: neither bytecode nor pytest's nor hypothesis's.
UNCACHED = env PYTHONDONTWRITEBYTECODE=1 \
	HYPOTHESIS_STORAGE_DIRECTORY="$$(tools/cache-dir)/hypothesis" $(PYTHON)
PYTEST = $(UNCACHED) -m pytest -p no:cacheprovider
ARGS ?=

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: deps
deps: ## install the Debian packages that are missing (as root), and say which
	@tools/deps requirements/debian.txt

.PHONY: venv
venv: deps
	@$(AS_OWNER) $(MAKE) python

# BPF objects are compiled while Python's packages come.
.PHONY: build
build: deps ## build the BPF objects and the C extensions, in place
	@$(AS_OWNER) $(MAKE) -j2 objects

# Below, already as the checkout's owner.
.PHONY: python
python:
	@tools/venv
	@tools/pytree

.PHONY: objects
objects: python $(BPF_OBJECTS) $(CLIENTS) build/stamp/extension build/stamp/defects

# The real program with one deliberate defect each, for the test that must catch them.
build/stamp/defects: tests/packets/defects.py $(wildcard bpf/*.h xdp/*.h xdp/lb.bpf.c)
	@mkdir -p $(@D)
	python3 tests/packets/defects.py
	@touch $@

%.bpf.o: %.bpf.c Makefile
	@mkdir -p build/dep/$(@D) build/obj/$(@D)
	clang $(BPF_CFLAGS) -MMD -MP -MT $@ -MF build/dep/$@.d -c $< -o build/obj/$@
	@llvm-strip -g build/obj/$@ # DWARF; BTF stays
	@mv build/obj/$@ $@

# Of tests and benchmarks; nothing that is installed.
$(CLIENTS): build/%: perf/%.c perf/socket_client.h Makefile
	@mkdir -p $(@D)
	$(CC) -O2 -g -Wall -Wextra -Werror -o $@ $<

-include $(BPF_OBJECTS:%=build/dep/%.d)

build/venv/made-from: | python ;

build/stamp/extension: $(wildcard setup.py lb/*.c lb/*.h kern/*.c bpf/*.h xdp/*.h) build/venv/made-from
	@mkdir -p build/stamp
	@if [ -e setup.py ]; then \
		echo "Building the C extensions ..."; \
		$(PYTHON) setup.py -q build_ext --inplace --build-temp build/ext; \
	fi
	@touch $@

.PHONY: stage
stage: build ## collect what `make install` copies, in build/stage
	@$(AS_OWNER) tools/stage

# The scripts read DESTDIR, PREFIX and SYSCONFDIR; a default stands in tools/installed.
export DESTDIR PREFIX SYSCONFDIR PURGE

.PHONY: install
install: stage ## install below DESTDIR and PREFIX (/usr/local); no compiler is needed there
	@tools/install

.PHONY: uninstall
uninstall: ## remove that again; PURGE=yes: configuration, and what is in the kernel, too
	@tools/uninstall

.PHONY: lint
lint: venv ## ruff, mypy and clang-format
	$(AS_OWNER) build/venv/bin/ruff check --quiet .
	$(AS_OWNER) build/venv/bin/ruff format --quiet --check .
	$(AS_OWNER) build/venv/bin/clang-format --dry-run -Werror $(C_SOURCES)
	$(AS_OWNER) tools/mypy

.PHONY: format
format: venv ## rewrite Python and C in the project's format
	$(AS_OWNER) build/venv/bin/ruff check --quiet --fix-only .
	$(AS_OWNER) build/venv/bin/ruff format .
	$(AS_OWNER) build/venv/bin/clang-format -i $(C_SOURCES)

.PHONY: unit
unit: build ## the pure tests; no root needed
	$(PYTEST) tests/unit $(ARGS)

.PHONY: packets
packets: need-root build ## single packets through the real programs (root)
	$(PYTEST) tests/packets $(ARGS)

.PHONY: netns
netns: need-root build ## real sockets across network namespaces (root)
	$(PYTEST) tests/netns $(ARGS)

# One recipe, so that also `make -j` keeps the order. What lint says is told at the end.
.PHONY: test
test: need-root ## lint, build and all of the tests above (root)
	@SECONDS=0 status=0; \
	$(MAKE) build; \
	log=$$(mktemp); \
	$(MAKE) lint >"$$log" 2>&1 & lint=$$!; \
	tools/run-tests $(PYTEST) -- $(ARGS) || status=$$?; \
	wait $$lint || status=1; \
	cat "$$log"; rm "$$log"; \
	tools/check-owner || status=1; \
	echo "make test: $$((SECONDS / 60)) min $$((SECONDS % 60)) s, of $$(nproc) processors"; \
	exit $$status

.PHONY: demo
demo: need-root build ## the lab, live; ARGS=--stay keeps it up (root)
	@$(UNCACHED) -m shunt.lab.demo $(ARGS)

.PHONY: test-kernels
test-kernels: need-root build ## packet and kernel tests on Debian's 6.1 and 6.12 kernels, in QEMU (root)
	@tools/deps requirements/debian.txt requirements/debian-kernels.txt
	@$(UNCACHED) -m tests.kernels.run $(ARGS)

.PHONY: fuzz-api
fuzz-api: need-root build ## schemathesis against a real shuntd's API; ARGS="--examples 1000" (root)
	@$(UNCACHED) -m tests.fuzz.api $(ARGS)

.PHONY: test-systemd
test-systemd: need-root stage ## Shunt installed on a booted systemd-nspawn machine, with traffic (root)
	@tools/deps requirements/debian.txt requirements/debian-systemd.txt
	$(PYTEST) $(wildcard tests/e2e/test_systemd*.py) $(ARGS)

.PHONY: test-delivery
test-delivery: need-root build ## each way of traffic to a VIP, with real keepalived (root)
	@tools/deps requirements/debian.txt requirements/debian-delivery.txt
	$(PYTEST) tests/e2e/test_delivery.py $(ARGS)

.PHONY: test-streams
test-streams: need-root build ## a million mixed messages on 1,000 redirected connections, byte for byte (root)
	SHUNT_STREAM_CONNECTIONS=1000 SHUNT_STREAM_MESSAGES=1000000 \
	$(PYTEST) tests/netns/test_streams_programs.py -k byte_for_byte $(ARGS)

.PHONY: test-connections
test-connections: need-root build ## 100,000 short connections through TC, shuntd restarted meanwhile (root)
	$(PYTEST) tests/e2e/test_connections.py $(ARGS)

# Go's compiler is a Python package of 80 MB, and nothing else needs it.
build/programs/go/made: requirements/programs.txt
	$(PYTHON) -m pip install -qq --disable-pip-version-check --no-deps --upgrade --target $(@D) -r $<
	@touch $@

build/programs/client: tests/e2e/clients/client.go build/programs/go/made
	GOCACHE=$(CURDIR)/build/programs/cache GOTOOLCHAIN=local CGO_ENABLED=0 \
		build/programs/go/go/bin/go build -o $@ $<

build/programs/Client.class: tests/e2e/clients/Client.java
	@mkdir -p $(@D)
	javac -d $(@D) $<

.PHONY: test-hooks
test-hooks: need-root build ## users' hooks compiled by bcc (root)
	@tools/deps requirements/debian.txt requirements/debian-hooks.txt
	BCC_KERNEL_SOURCE="$$(tools/kernel-headers)" $(PYTEST) tests/packets/test_hooks.py tests/netns/test_hooks.py $(ARGS)

.PHONY: test-programs
test-programs: need-root build ## VIPs at the socket: others' programs, storms, thousands, Go and Java (root)
	@tools/deps requirements/debian.txt requirements/debian-programs.txt requirements/debian-perf.txt
	@$(AS_OWNER) $(MAKE) build/programs/client build/programs/Client.class
	$(PYTEST) $(wildcard tests/e2e/test_socket_*.py) tests/e2e/test_perf_sockets.py $(ARGS)

# The results are root's work, and the owner's files.
.PHONY: perf-packet
perf-packet: need-root build ## nanoseconds a packet, to perf/results/packet.json (root)
	$(UNCACHED) -m perf.packet $(ARGS)
	@tools/give-back perf/results

.PHONY: perf-scale
perf-scale: need-root build ## the daemon with 10,000 services, to perf/results/scale.json (root)
	$(UNCACHED) -m perf.scale $(ARGS)
	@tools/give-back perf/results

.PHONY: perf-tc
perf-tc: need-root build ## TC beside nftables and iptables, to perf/results/tc.json (root)
	$(UNCACHED) -m perf.tc $(ARGS)
	@tools/give-back perf/results

.PHONY: perf-sockets
perf-sockets: need-root build ## sockets beside nftables and iptables, to perf/results/sockets.json (root)
	@tools/deps requirements/debian.txt requirements/debian-perf.txt
	$(UNCACHED) -m perf.sockets $(ARGS)
	@tools/give-back perf/results

.PHONY: perf-maglev
perf-maglev: build ## balance and disruption of Maglev, to perf/results/maglev_paper.*
	$(AS_OWNER) $(PYTHON) -m perf.maglev_paper $(ARGS)

.PHONY: fuzz-packets
fuzz-packets: need-root build ## 10 million random packets through the balancer, TC and decap; ARGS="--seed 1" (root)
	@$(UNCACHED) -m tests.fuzz.packets $(ARGS)

.PHONY: lock
lock: deps ## pin again what requirements/run.txt and dev.txt bring with them
	$(AS_OWNER) tools/lock

.PHONY: clean
clean: ## remove what was built
	rm -rf build $(BPF_OBJECTS) $(wildcard lb/*.so kern/*.so)

.PHONY: need-root
need-root:
	@if [ "$$(id -u)" != 0 ]; then \
		printf '%s\n' 'make $(MAKECMDGOALS) needs root' \
			'  why: it loads BPF programs and creates network namespaces' \
			'  fix: sudo make $(MAKECMDGOALS)' >&2; \
		exit 1; \
	fi
