# SPDX-License-Identifier: Apache-2.0
"""TLS for checks of types https and grpc."""

from __future__ import annotations

import ssl
from functools import cache


@cache
def context(verify: bool, alpn: str = "") -> ssl.SSLContext:
    """The context for a way to verify; reading the host's authorities takes some 20 ms, once."""
    made = ssl.create_default_context()
    if not verify:
        made.check_hostname = False
        made.verify_mode = ssl.CERT_NONE
    if alpn:
        made.set_alpn_protocols([alpn])
    return made


def problem(error: ssl.SSLError) -> str:
    """What is wrong, for people."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate: {error.verify_message}"
    return f"TLS: {(error.reason or str(error)).lower().replace('_', ' ')}"
