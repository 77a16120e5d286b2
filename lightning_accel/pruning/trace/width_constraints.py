"""Which groups must keep the same width, because a forward takes two sizes for the same.

Every dimension counts a constant and so many positions per unit of some groups: its form. Where an
equation says that two forms are equal (`reshape(batch, tokens, width)` after attention: the width of the
embedding is that of all heads together), the groups are linked; where that cannot be, they are refused.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lightning_accel.pruning.trace.sizes import Attribute, Equation, Length, Sum
from lightning_accel.pruning.trace.union_find import Ids

Form = dict[str, int]  # group -> positions per unit; "" -> constant


class WidthConstraints:
    """The forms of all equations.

    Args:
        equations: Those in which something can change.
        root: The representative of each atom.
        roots: The representatives of each group's units.
    """

    def __init__(self, equations: list[Equation], root: Ids, roots: Mapping[str, Ids]) -> None:
        self._root = root
        self._units = roots
        self._group = np.zeros(len(root), dtype=np.int64)
        self._names = ["", *roots]
        for number, name in enumerate(roots, 1):
            self._group[roots[name]] = number
        self._equations = equations
        self._attributes: dict[Attribute, Form] = {}
        for equation in equations:
            if isinstance(equation.expression, Attribute):
                form = self.of(equation.atoms)
                if form is not None:
                    self._attributes.setdefault(equation.expression, form)

    def of(self, atoms: Ids) -> Form | None:
        """Return the form of a dimension, or `None` if its units have unequal parts."""
        roots = self._root[atoms]
        groups = self._group[roots]
        form: Form = {"": int((groups == 0).sum())}
        for number in np.unique(groups[groups > 0]):
            name = self._names[number]
            _, counts = np.unique(roots[groups == number], return_counts=True)
            # Only what counts every unit alike is linear in the number of units that are left.
            if len(counts) != len(self._units[name]) or len(set(counts.tolist())) > 1:
                return None
            form[name] = int(counts[0])
        return {key: n for key, n in form.items() if n}

    def links(self) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
        """Return link and positions per unit of each linked group, and the groups that cannot follow."""
        links: dict[str, tuple[int, int]] = {}
        wrong: dict[str, str] = {}
        for left, right, place in self._pairs():
            if left is None or right is None or left == right:
                continue
            names = {*left, *right} - {""}
            # n units of one are m of another: both can shrink in step. A constant, or a sum of groups, leaves
            # no such step.
            if len(left) == len(right) == 1 and len(names) == 2:
                (a, per_a), (b, per_b) = *left.items(), *right.items()
                if _link(links, a, per_a, b, per_b):
                    continue
            for name in names:
                wrong[name] = f"the forward of `{place}` takes its width for another that stays"
        return links, wrong

    def _pairs(self) -> Iterator[tuple[Form | None, Form | None, str]]:
        for equation in self._equations:
            left, right = self._expression(equation.expression), self.of(equation.atoms)
            if left is not None:
                yield left, right, equation.place
            # `width // heads == 64`: the quotient itself has no form, but it stays only if both shrink in step.
            elif right is not None and set(right) <= {""}:
                yield *self._quotient(equation.expression, right.get("", 0)), equation.place

    def _quotient(self, expression: Any, counted: int) -> tuple[Form | None, Form | None]:
        """Read `a // b == constant` as `a == constant * b`."""
        if isinstance(expression, Sum) and expression.verb is operator.floordiv:
            left, right = self._expression(expression.left), self._expression(expression.right)
            if left is not None and right is not None:
                return left, {key: n * counted for key, n in right.items()}
        return None, None

    def _expression(self, expression: Any) -> Form | None:
        if isinstance(expression, int):
            return {"": int(expression)} if expression else {}
        if isinstance(expression, Length):
            return self.of(expression.atoms)
        if isinstance(expression, Attribute):
            return self._attributes.get(expression)
        left, right = self._expression(expression.left), self._expression(expression.right)
        if left is None or right is None:
            return None
        if expression.verb is operator.add:
            return {key: left.get(key, 0) + right.get(key, 0) for key in {**left, **right}}
        # A product of two groups is not linear, and says nothing here; the proof looks at it.
        if expression.verb is operator.mul:
            for one, other in ((left, right), (right, left)):
                if set(one) <= {""}:
                    return {key: n * one.get("", 0) for key, n in other.items()}
        # Rounding down is linear only where nothing is rounded.
        divides = expression.verb is operator.floordiv and set(right) == {""}
        if divides and all(n % right[""] == 0 for n in left.values()):
            return {key: n // right[""] for key, n in left.items()}
        return None


def _link(links: dict[str, tuple[int, int]], a: str, per_a: int, b: str, per_b: int) -> bool:
    """Put two groups into one link; return whether their parts per unit fit what is known."""
    if a in links and b in links:
        (link_a, known_a), (link_b, known_b) = links[a], links[b]
        # Both were linked before, by another ratio: then no width fits both equations.
        if known_a * per_b != known_b * per_a:
            return False
        for name, (link, per) in list(links.items()):
            if link == link_b:
                links[name] = (link_a, per)
        return True
    if b in links:
        a, per_a, b, per_b = b, per_b, a, per_a
    if a in links:
        link, known = links[a]
        if known * per_b % per_a:
            return False
        links[b] = (link, known * per_b // per_a)
        return True
    new = max((link for link, _ in links.values()), default=-1) + 1
    # In lowest terms, so that the step in which both can shrink is the least.
    shared = math.gcd(per_a, per_b)
    links[a], links[b] = (new, per_a // shared), (new, per_b // shared)
    return True
