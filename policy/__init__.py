# SPDX-License-Identifier: Apache-2.0
"""Who may talk to whom: source ranges of services."""
