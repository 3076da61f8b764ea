# SPDX-License-Identifier: Apache-2.0
"""The engine, pure: services, Maglev, ids, slots, and the tables compiled from them."""
