"""Checking the keys of a config."""

import difflib
from collections.abc import Iterable


def check_keys(what: str, given: Iterable[str], allowed: set[str]) -> None:
    """Raise a ValueError that names what is allowed, and the near misses, for an unknown key."""
    for key in given:
        if key not in allowed:
            near = difflib.get_close_matches(str(key), allowed)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise ValueError(f"unknown key {key!r} in {what}: {hint}allowed: {sorted(allowed)}")
