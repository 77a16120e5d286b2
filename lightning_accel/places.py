"""Where files may be written that a configuration names: below the run's folder.

A path in Python is the user's own. One in yaml may be a stranger's, and `path: ../../.bashrc` is a path too.
"""

from __future__ import annotations

import re


def leads_elsewhere(text: str) -> bool:
    r"""Tell whether a text, taken as a path, would leave the folder that it starts in.

    >>> [leads_elsewhere(t) for t in ("runs/a.json", "val/acc", "../a", "/a", "~/a", r"a\..\..\b", "C:\\a")]
    [False, False, True, True, True, True, True]
    """
    parts = re.split(r"[/\\]", text)
    absolute = text.startswith(("/", "\\", "~")) or re.match(r"[A-Za-z]:[/\\]", text) is not None
    return (
        absolute
        or "\0" in text
        or text.startswith("file:")
        or any(p.strip() == ".." for p in parts)
    )
