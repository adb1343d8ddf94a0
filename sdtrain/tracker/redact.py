"""Secrets out of a plain tree before it is written anywhere."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

REDACTED = "<redacted>"
_SECRET_KEY = re.compile(r"(^|_)(api_?key|access_?key|token|secret|passw(or)?d|credentials?)$", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(r"(key|token|secret|passw|credential)", re.IGNORECASE)
_SHORTEST_SECRET = 8  # shorter values of such variables ("1", "true") are switches, and stand everywhere


def without_secrets(tree: Any) -> Any:
    """A copy in which values under secret-looking keys, and values of secret-looking environment variables, are gone.

    The second catches `${oc.env:NAME}` under any key, also inside a longer text such as a URL.
    """
    secrets = [
        value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name) and len(value) >= _SHORTEST_SECRET
    ]
    return _redact(tree, secrets)


def _redact(tree: Any, secrets: list[str]) -> Any:
    if isinstance(tree, Mapping):
        return {
            key: REDACTED if _SECRET_KEY.search(str(key)) and isinstance(value, str) else _redact(value, secrets)
            for key, value in tree.items()
        }
    if isinstance(tree, list | tuple):
        return [_redact(item, secrets) for item in tree]
    if isinstance(tree, str):
        for secret in secrets:
            tree = tree.replace(secret, REDACTED)
    return tree
