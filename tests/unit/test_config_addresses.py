# SPDX-License-Identifier: Apache-2.0
"""Addresses as they are written in files."""

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shunt.agent.sources import values


@given(
    st.one_of(
        st.ip_addresses().map(str),
        st.text(alphabet="0123456789.:abfx% /-\x00٣", max_size=18),
        st.lists(st.sampled_from(["0", "00", "7", "010", "255", "256", "1e", "", " 1"])).map(
            ".".join
        ),
    )
)
def test_addresses_are_those_of_ipaddress(text: str) -> None:
    """Which is slower for IPv4, and the one that says what an address is."""
    try:
        expected = values.usable(ip_address(text), "vip")
    except ValueError:
        with pytest.raises(values.Refused):
            values.address(text, "vip")
    else:
        assert values.address(text, "vip") == expected
