# SPDX-License-Identifier: Apache-2.0
"""The engine, pure: the model of services, Maglev, ids, slots, and the tables compiled from them."""
