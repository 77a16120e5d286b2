"""What must not be written down: tokens, passwords and keys of a configuration.

Config values end in logger backends, `.hydra/`, hparams files, error texts and W&B's offline logs, which people
share. A value is withheld when a key above it names a secret (in text such as `token=...` and in JSON too), when it
has the shape of a well-known token, when it is a URL with a password in it, when it is the value of an environment
variable whose name names a secret, and wherever `provenance.py` says that it came from the environment.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

HIDDEN = "***"
_SECRETS = {
    *(
        "accesskey",
        "apikey",
        "auth",
        "authorization",
        "authtoken",
        "credential",
        "dsn",
        "key",
        "pass",
    ),
    *("passphrase", "passwd", "password", "pat", "pin", "privatekey", "pwd", "secret", "secretkey"),
    *("token", "webhook"),
}
_ENDINGS = (
    "password",
    "passwd",
    "passphrase",
    "apikey",
    "secret",
    "authtoken",
    "accesstoken",
    "webhook",
)
_NOT_SECRET = {
    "token": "avg bos cls count eos image mask max mean min n num pad per sep special start stop total unk",
    "key": "d dim max min n num sort",
    "pass": "backward fast forward full max min n num one single two",
    "pin": "num",
}
_OF_KEYS = {"access", "api", "auth", "encryption", "private", "secret", "signing", "ssh", "wandb"}
"""What makes the plural `keys` secret; by itself it names columns of data."""
_IN_ENVIRONMENT = ("PWD", "OLDPWD")  # where the shell is, and was
_ASSIGNMENT = re.compile(
    r"(?<![\w.-])(?P<key>[\w.-]{1,100})(?P<between>[\"']?\s*[:=]\s*)"
    r"(?P<value>\"(?:[^\"\\]|\\.)*\"|'[^']*'|[^,\s\]}&]+)"
)
_SHAPES = (
    (re.compile(r"(?<=://)[^/\s@]+@"), f"{HIDDEN}@"),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*-----|$)", re.DOTALL), HIDDEN),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.+/=~-]{8,}"), rf"\1 {HIDDEN}"),
    (re.compile(r"https://(?:hooks\.slack\.com|discord(?:app)?\.com/api/webhooks|[\w.-]+\.webhook\.office\.com)/\S+"), HIDDEN),
    (
        re.compile(
            r"\b(?:gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{15,}|hf_\w{20,}|sk-[\w-]{20,}|AKIA[A-Z0-9]{16}"
            r"|AIza[\w-]{30,}|xox[abeprs]-[\w-]{10,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*|wandb_v\d_\w{20,}|npm_\w{30,})"
        ),
        HIDDEN,
    ),
)  # fmt: skip
_SHORTEST, _SHORTEST_IN_ERRORS = 8, 4  # shorter values are words, not secrets


def redacted(
    tree: Any, environ: Mapping[str, str] = os.environ, *, known: Collection[str] = ()
) -> Any:
    """Return a copy of plain containers with every secret replaced by `***`.

    Args:
        tree: Plain containers, or a text.
        environ: Variables whose values are withheld if their names name secrets.
        known: Further values to withhold wherever they stand.

    >>> redacted({"lr": 0.1, "api_key": "abc", "url": "https://me:pw@host/x"}, {})
    {'lr': 0.1, 'api_key': '***', 'url': 'https://***@host/x'}
    """
    values = {*known, *_of_environment(environ), *below_secrets(tree)}
    lengthy = sorted((v for v in values if len(v) >= _SHORTEST), key=len, reverse=True)
    return _walk(tree, lengthy, False)


def names_secret(key: str) -> bool:
    """Tell whether a key says that its value is a secret.

    >>> names_secret("WANDB_API_KEY"), names_secret("num_tokens"), names_secret("logger.w.dbPassword")
    (True, False, True)
    >>> [names_secret(key) for key in ("AWS_ACCESS_KEY_ID", "GITHUB_PAT", "api_keys", "keys", "pad_token")]
    [True, True, True, False, False]
    """
    name = key.rpartition(".")[2]
    words = [
        w.lower().rstrip("0123456789")
        for w in re.findall(r"[A-Z]+(?![a-z])|[A-Za-z][a-z0-9]*", name)
    ]
    if words[-2:] == ["key", "id"] or "webhook" in words or "webhooks" in words:
        return True
    if not words:
        return False
    last, before = words[-1], words[-2] if len(words) > 1 else ""
    if last == "pass" and not before:
        return False  # of a loop over data
    one = last.removesuffix("s") if last not in ("pass", "dns") else last
    if one not in _SECRETS and not one.endswith(_ENDINGS):
        return False
    if last == "keys":
        return before in _OF_KEYS
    return before not in _NOT_SECRET.get(one, "").split()


def below_secrets(tree: Any) -> set[str]:
    """Return the texts below keys that name secrets."""
    found: set[str] = set()

    def visit(node: Any, secret: bool) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                visit(value, secret or names_secret(str(key)))
        elif isinstance(node, (list, tuple, set)):
            for item in node:
                visit(item, secret)
        elif secret and isinstance(node, str):
            found.add(node)
        elif secret and isinstance(node, (int, float)) and not isinstance(node, bool):
            found.add(str(node))

    visit(tree, False)
    return found


@contextmanager
def unsaid(secrets: Collection[str], environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Take secrets out of the text of an error that leaves this block, and of those that caused it.

    >>> with unsaid({"hunter2"}):
    ...     raise ValueError("cannot log in with hunter2")
    Traceback (most recent call last):
    ValueError: cannot log in with ***
    """
    try:
        yield
    except Exception as error:
        values = {v for v in (*secrets, *_of_environment(environ)) if len(v) >= _SHORTEST_IN_ERRORS}
        known = sorted(values, key=len, reverse=True)
        seen: set[int] = set()
        queue: list[BaseException | None] = [error]
        while queue:
            one = queue.pop()
            if one is not None and id(one) not in seen:
                seen.add(id(one))
                _clean(one, known)
                queue += [one.__cause__, one.__context__]
        raise


def _clean(error: BaseException, known: list[str]) -> None:
    error.args = tuple(_text(a, known) if isinstance(a, str) else a for a in error.args)
    more = [name for name in ("strerror", "filename", "filename2", "msg") if hasattr(error, name)]
    for name in {*vars(error), *more}:  # an OSError does not make its text of `args`
        value = getattr(error, name)
        if isinstance(value, str):
            setattr(error, name, _text(value, known))
        elif isinstance(value, list):  # `__notes__`
            setattr(error, name, [_text(v, known) if isinstance(v, str) else v for v in value])


def _of_environment(environ: Mapping[str, str]) -> set[str]:
    return {v for k, v in environ.items() if names_secret(k) and k not in _IN_ENVIRONMENT}


def _walk(node: Any, known: list[str], secret: bool) -> Any:
    if isinstance(node, dict):
        return {
            _key(k, known): _walk(v, known, secret or names_secret(str(k))) for k, v in node.items()
        }
    if isinstance(node, (list, tuple)):
        return [_walk(item, known, secret) for item in node]
    if secret:
        return node if node is None or isinstance(node, bool) or node == "" else HIDDEN
    return _text(node, known) if isinstance(node, str) else node


def _key(key: Any, known: list[str]) -> Any:
    for value in known if isinstance(key, str) else ():
        key = key.replace(value, HIDDEN)
    return key


def _text(text: str, known: list[str]) -> str:
    for value in known:
        text = text.replace(value, HIDDEN)
    if text.lstrip().startswith(("{", "[")):
        try:
            parsed = json.loads(text)
            clean = _walk(parsed, known, False)
            text = json.dumps(clean) if clean != parsed else text
        except (ValueError, RecursionError):
            pass  # not JSON
    text = _ASSIGNMENT.sub(_withheld, text)
    for pattern, instead in _SHAPES:
        text = pattern.sub(instead, text)
    return text


def _withheld(found: re.Match[str]) -> str:
    key, between, value = found["key"], found["between"], found["value"]
    prose = key.lower() in _SECRETS and between.strip() == ":"  # "a missing key: net.weight"
    if prose or not names_secret(key) or value in ("null", "None", "''", '""'):
        return found[0]
    quote = value[0] if value[0] in "\"'" else ""
    return f"{key}{between}{quote}{HIDDEN}{quote}"
