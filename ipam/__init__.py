# SPDX-License-Identifier: Apache-2.0
"""Which address belongs to whom. Pure: pools of VIPs."""
