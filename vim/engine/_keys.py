"""Checking the keys of a config."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def check_keys(what: str, given: Iterable[str], allowed: set[str]) -> None:
    """Raise a ValueError that names what is allowed, and the near misses, for an unknown key."""
    for key in given:
        if key not in allowed:
            near = difflib.get_close_matches(str(key), allowed)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise ValueError(f"unknown key {key!r} in {what}: {hint}allowed: {sorted(allowed)}")


def given_keys(
    what: str, cfg: Mapping[str, Any], allowed: set[str], needed: Sequence[str] = ()
) -> dict[str, Any]:
    """Return what a config says, without the keys that it leaves at None.

    Raises:
        ValueError: a key that is not allowed, or none where one is needed.
    """
    check_keys(what, cfg, allowed)
    given = {key: value for key, value in cfg.items() if value is not None}
    for key in needed:
        if key not in given:
            raise ValueError(f"a {what} needs the key {key!r}, got only {sorted(given)}")
    return given
