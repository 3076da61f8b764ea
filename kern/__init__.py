# SPDX-License-Identifier: Apache-2.0
"""The only place with BPF, netlink and inotify system calls."""
