# SPDX-License-Identifier: Apache-2.0
"""Health checks on the network: what is asked, and when; deciding is lb/health.py."""
