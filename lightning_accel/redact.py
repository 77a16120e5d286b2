"""What must not be written down: tokens, passwords and keys of a configuration.

Config values end in logger backends, `.hydra/`, hparams files and W&B's offline logs, which people
share. A value is withheld when its key names a secret (also in text such as `token=...`), when it is a
URL with a password in it, or when it is the value of an environment variable whose name names a secret
(`${oc.env:API_KEY}` under another key).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
_SECRETS = {
    "apikey",
    "authorization",
    "credential",
    "credentials",
    "dsn",
    "key",
    "passwd",
    "password",
    "secret",
    "token",
}
_ASSIGNMENT = re.compile(r"([\w.]+)=([^,\s\]}&]+)")
_USER_IN_URL = re.compile(r"(?<=://)[^/\s@]+@")
_SHORTEST = 8  # environment values below this length are words, not secrets


def redacted(tree: Any, environ: Mapping[str, str] = os.environ) -> Any:
    """Return a copy of plain containers with every secret replaced by `***`.

    >>> redacted({"lr": 0.1, "api_key": "abc", "url": "https://me:pw@host/x"}, {})
    {'lr': 0.1, 'api_key': '***', 'url': 'https://***@host/x'}
    """
    known = {v for k, v in environ.items() if names_secret(k) and len(v) >= _SHORTEST}
    return _walk(tree, known)


def names_secret(key: str) -> bool:
    """Tell whether a key's last word says that its value is a secret.

    >>> names_secret("WANDB_API_KEY"), names_secret("num_tokens"), names_secret("logger.w.dbPassword")
    (True, False, True)
    """
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Za-z][a-z0-9]*", key)
    return bool(words) and words[-1].lower() in _SECRETS


def _walk(node: Any, known: set[str]) -> Any:
    if isinstance(node, dict):
        return {
            k: HIDDEN if isinstance(v, str) and v and names_secret(str(k)) else _walk(v, known)
            for k, v in node.items()
        }
    if isinstance(node, (list, tuple)):
        return [_walk(item, known) for item in node]
    if not isinstance(node, str):
        return node
    for value in known:
        node = node.replace(value, HIDDEN)
    node = _ASSIGNMENT.sub(lambda m: f"{m[1]}={HIDDEN}" if names_secret(m[1]) else m[0], node)
    return _USER_IN_URL.sub(f"{HIDDEN}@", node)
