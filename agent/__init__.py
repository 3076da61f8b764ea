# SPDX-License-Identifier: Apache-2.0
"""shuntd: sources, plan, apply, probes, observation and the local API."""
