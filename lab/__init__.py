# SPDX-License-Identifier: Apache-2.0
"""Network-namespace topologies for the demo, the tests and the benchmarks."""
