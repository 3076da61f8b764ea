# SPDX-License-Identifier: Apache-2.0
"""Programs of sockets and their attaching."""
