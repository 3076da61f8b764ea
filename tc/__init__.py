# SPDX-License-Identifier: Apache-2.0
"""TC programs and their attaching."""
