"""Seeds by name: what is drawn for one purpose tells nothing of what is drawn for another."""

from __future__ import annotations

import hashlib


def seed_of(name: str) -> int:
    """A number of 56 bits that stands for the name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")
