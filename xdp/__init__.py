# SPDX-License-Identifier: Apache-2.0
"""XDP programs and their attaching."""
