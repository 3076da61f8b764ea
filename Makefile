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

BPF_SOURCES := $(wildcard xdp/*.bpf.c tc/*.bpf.c sockops/*.bpf.c perf/*.bpf.c \
	tests/*.bpf.c tests/*/*.bpf.c)
BPF_OBJECTS := $(BPF_SOURCES:.c=.o)
C_SOURCES := $(wildcard bpf/*.h xdp/*.c tc/*.c sockops/*.c lb/*.c lb/*.h perf/*.c perf/*.h \
	tests/*.bpf.c tests/*/*.bpf.c)

# -mcpu=v3 (32-bit registers' jumps, atomics) is what every supported kernel takes; the
# prefix map keeps the line information, and so the object, the same in every directory.
BPF_CFLAGS := -O2 -g -target bpf -mcpu=v3 -D__TARGET_ARCH_$(BPF_ARCH) -Ibpf \
	-isystem /usr/include/$(TRIPLET) -ffile-prefix-map=$(CURDIR)=. \
	-Wall -Wextra -Werror

# Root leaves no caches in the checkout: neither bytecode nor pytest's nor hypothesis's.
TEST_ENV := PYTHONDONTWRITEBYTECODE=1 HYPOTHESIS_STORAGE_DIRECTORY=$(shell tools/cache-dir)/hypothesis
PYTEST := env $(TEST_ENV) $(PYTHON) -m pytest -p no:cacheprovider

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: deps
deps: ## install the Debian packages that are missing (as root), and say which
	@tools/deps requirements/debian.txt

.PHONY: venv
venv: deps
	@$(AS_OWNER) tools/venv
	@$(AS_OWNER) tools/pytree

.PHONY: build
build: venv ## build the BPF objects and the C extension, in place
	@$(AS_OWNER) $(MAKE) objects

# One level down, already as the checkout's owner.
.PHONY: objects
objects: $(BPF_OBJECTS) build/stamp/extension

%.bpf.o: %.bpf.c Makefile
	@mkdir -p build/dep/$(@D) build/obj/$(@D)
	clang $(BPF_CFLAGS) -MMD -MP -MT $@ -MF build/dep/$@.d -c $< -o build/obj/$@
	@llvm-strip -g build/obj/$@ # DWARF; BTF stays
	@mv build/obj/$@ $@

-include $(BPF_OBJECTS:%=build/dep/%.d)

build/stamp/extension: $(wildcard setup.py lb/*.c lb/*.h) build/venv/made-from
	@mkdir -p build/stamp
	@if [ -e setup.py ]; then \
		echo "Building the C extension ..."; \
		$(PYTHON) setup.py -q build_ext --inplace --build-temp build/ext; \
	fi
	@touch $@
