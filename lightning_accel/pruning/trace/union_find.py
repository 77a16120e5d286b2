"""Which indices of which dimensions can only go together: a union-find over numbered atoms.

Every index of every dimension of every tensor carries an atom. Two indices that a layer combines one to
one (an addition, a contraction) are joined; what hangs on the network's input or output, or on a number
written in its code, is fixed. What is left, unfixed and joined, is removed or kept as one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

_CAUSE = 1 << 24
"""Reasons from this number on say why; smaller ones only what became of a dimension that stays anyway."""
_FOLLOWS = (
    "a split in the forward",
    "it is merged",
    "it has size 1",
    "it is reduced",
    "it is stacked",
)


class UnionFind:
    """A growing partition; every part is free, or fixed with a reason.

    >>> atoms = UnionFind()
    >>> a, b = atoms.fresh(3), atoms.fresh(3)
    >>> atoms.join(a, b)
    >>> atoms.fix(b[:1], "it is the input")
    >>> atoms.is_fixed(a).tolist(), atoms.reason(a)
    ([True, False, False], 'it is the input')
    """

    def __init__(self) -> None:
        self.count = 0
        self._parent = np.arange(1024)
        self._why = np.zeros(1024, dtype=np.int32)  # 0: free
        self._reasons, self._codes = [""], {"": 0}

    def fresh(self, size: int, reason: str = "") -> Ids:
        """Return `size` new atoms, each on its own; fixed if there is a reason."""
        start, self.count = self.count, self.count + size
        # Doubled, so that a pass of many small tensors copies each number a few times only.
        while self.count > len(self._parent):
            more = len(self._parent)
            self._parent = np.concatenate([self._parent, np.arange(more, 2 * more)])
            self._why = np.concatenate([self._why, np.zeros(more, dtype=np.int32)])
        ids = np.arange(start, self.count)
        if reason:
            self._why[ids] = self._code(reason)
        return ids

    def find(self, ids: Ids) -> Ids:
        """Return the representative of each atom's part."""
        roots = self._parent[ids]
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                # Paths are compressed for what was asked only: whole arrays at once, and no loop over atoms in
                # Python.
                self._parent[ids] = roots
                return roots
            roots = above

    def join(self, a: Ids, b: Ids) -> None:
        """Join the parts of `a` and `b`, place by place; the two broadcast."""
        if a is b:
            return
        a, b = (np.ravel(side) for side in np.broadcast_arrays(a, b))
        while True:
            roots_a, roots_b = self.find(a), self.find(b)
            apart = roots_a != roots_b
            if not apart.any():
                return
            # All pairs hook at once, each larger root under the smallest that it meets. One root may meet
            # several and only one wins, so this goes round until none are apart (Shiloach and Vishkin 1982).
            low = np.minimum(roots_a[apart], roots_b[apart])
            high = np.maximum(roots_a[apart], roots_b[apart])
            np.minimum.at(self._parent, high, low)
            # Fixed is stronger than free, and a cause stronger than what only follows from one: codes are
            # ordered so.
            np.maximum.at(self._why, self.find(high), self._why[high])

    def fix(self, ids: Ids, reason: str) -> None:
        """Keep these atoms, and all that are or will be joined to them, for good."""
        roots = np.unique(self.find(np.ravel(ids)))
        code = self._code(reason)
        # The first cause stands; it may replace what only follows from others.
        below = _CAUSE if code >= _CAUSE else 1
        self._why[roots[self._why[roots] < below]] = code

    def is_fixed(self, ids: Ids) -> NDArray[np.bool_]:
        return self._why[self.find(ids)] > 0

    def is_free(self, ids: Ids) -> bool:
        """Whether any of these atoms is free."""
        return bool((self._why[self.find(ids)] == 0).any())

    def reason(self, ids: Ids) -> str:
        """Return why the first fixed one of these atoms is fixed; what only follows comes last."""
        codes = self._why[self.find(ids)]
        known = [*codes[codes >= _CAUSE], *codes[codes > 0]]
        return self._reasons[known[0] % _CAUSE] if known else ""

    def _code(self, reason: str) -> int:
        code = self._codes.setdefault(reason, len(self._reasons))
        if code == len(self._reasons):
            self._reasons.append(reason)
        return code + (0 if reason.startswith(_FOLLOWS) else _CAUSE)
