"""Does the proof refuse what is wrong? Right cuts are made wrong on purpose, in twelve ways, and put to it.

`python benchmarks/proof_mutations.py [--only 'mixer*'] [--json PATH]` plans a cut by 40 % for each network,
those of `proof_nets` and those of `zoo` whose libraries are installed, and changes one thing in it, many
times: another index, order or attribute in one tensor or one layer. The network has random weights, all
different, so that nothing hides behind a zero.

A wrong cut may be equal to the right one by chance (an attribute that nothing reads). So each one that
passes is put to an oracle that shares nothing with the proof: both cuts are carried out, and the two small
networks run on other inputs, at another batch size. Where they agree, the change was none; where they do not,
it may be that channels were only renamed: then the dense network computes the same with them exchanged. Exit
status 1 if a wrong cut passes.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
import zoo
from proof_nets import NETS
from prune_oracle import distinct
from torch import Tensor, nn

from lightning_accel.errors import BrokenModel, NoEffect
from lightning_accel.measure import Table
from lightning_accel.pruning import plan
from lightning_accel.pruning.verify import Verifier
from lightning_accel.surgery import Cut, Select
from lightning_accel.surgery.call import as_call, cast, tensors
from lightning_accel.surgery.structure import named_tensors

RATIO = 0.4
EQUAL = 1e-9
"""Largest difference, over the output's scale, between two networks that compute the same."""

LARGE = """
    timm/mixer_s32_224 timm/vit_tiny_patch16_224 timm/resnet18 timm/resnetv2_50x1_bit
    timm/resnext26ts timm/densenet121 timm/mobilenetv3_small_050 timm/convnext_atto
    timm/convnextv2_atto timm/efficientnet_b0 timm/regnetx_002 timm/ghostnet_050 timm/poolformer_s12
    timm/mobilevit_xxs timm/xcit_nano_12_p16_224 timm/levit_128s timm/res2net50_14w_8s
    torchvision/resnet18 torchvision/shufflenet_v2_x0_5 torchvision/swin_t torchvision/googlenet
    transformers/bert transformers/gpt2 transformers/llama transformers/t5 transformers/vit
    transformers/convnext transformers/wav2vec2 transformers/mamba torch/transformer torch/lstm
"""


class Mutation(NamedTuple):
    """One change to a cut."""

    kind: str
    where: str
    cut: Cut


# -- ways of being wrong ----------------------------------------------------------------------------


def rolled(kept: Tensor, size: int, rng: random.Random) -> Tensor:
    """Every index one further."""
    return (kept + 1) % size


def turned(kept: Tensor, size: int, rng: random.Random) -> Tensor:
    """The right places, each in the place of the one before."""
    return kept.roll(1)


def shuffled(kept: Tensor, size: int, rng: random.Random) -> Tensor:
    """The right places in any order."""
    order = list(range(len(kept)))
    rng.shuffle(order)
    return kept[order]


def swapped(kept: Tensor, size: int, rng: random.Random) -> Tensor:
    """Two neighbours in each other's place: the bias, say, of another channel."""
    at = rng.randrange(len(kept) - 1) if len(kept) > 1 else 0
    found = kept.clone()
    found[at : at + 2] = kept[at : at + 2].flip(0)
    return found


def neighbour(kept: Tensor, size: int, rng: random.Random) -> Tensor:
    """One place that is gone for one that stays."""
    gone = sorted(set(range(size)) - set(kept.tolist()))
    found = kept.clone()
    if gone:
        found[rng.randrange(len(kept))] = rng.choice(gone)
    return found.sort().values


def others(kept: Tensor, size: int, rng: random.Random) -> Tensor:
    """As many places, of those that are gone before those that stay."""
    gone = sorted(set(range(size)) - set(kept.tolist()))
    return torch.tensor(sorted([*gone, *kept.tolist()][: len(kept)]))


def blocks(kept: Tensor, size: int, rng: random.Random) -> Tensor:
    """The first half behind the second: the groups of a convolution, the parts of fused projections."""
    return kept.roll(len(kept) // 2)


def transposed(kept: Tensor, size: int, rng: random.Random) -> Tensor:
    """Heads for their width: the places of a grid, read by columns."""
    for rows in (4, 3, 2):
        if len(kept) % rows == 0:
            return kept.view(rows, -1).T.reshape(-1)
    return kept


CHANGES: Sequence[Callable[[Tensor, int, random.Random], Tensor]] = (
    rolled,
    turned,
    shuffled,
    swapped,
    neighbour,
    others,
    blocks,
    transposed,
)


def mutations(cut: Cut, rng: random.Random, each: int) -> Iterator[Mutation]:
    """Yield changes to a cut, at most `each` of every kind."""
    places = [
        (name, dim)
        for name, kept in cut.kept.items()
        for dim, positions in enumerate(kept.dims)
        if positions is not None
    ]
    buffers = [p for p in places if p[0].rpartition(".")[2].startswith("running_")]
    for change in CHANGES:
        for name, dim in _some(places, each, rng):
            yield _mutation(change.__name__, cut, [(name, dim)], change, rng)
    for name, dim in _some(buffers, each, rng):
        yield _mutation("a norm's statistics", cut, [(name, dim)], rolled, rng)
    layers: dict[tuple[str, int], list[tuple[str, int]]] = {}
    for name, dim in places:
        layers.setdefault((name.rpartition(".")[0], dim), []).append((name, dim))
    for (layer, dim), mine in _some(list(layers.items()), each, rng):
        change = rng.choice([rolled, neighbour, others])
        same = random.Random(layer)  # the same change in all of the layer's tensors
        state = same.getstate()
        found = cut
        for place in mine:
            same.setstate(state)
            found = _mutation("", found, [place], change, same).cut
        yield Mutation("a whole layer", f"{layer} {dim}", found)
    sizes = [(m, key) for m, held in cut.attributes.items() for key in held]
    for module, key in _some(sizes, each, rng):
        kept = {k: v for k, v in cut.attributes[module].items() if k != key}
        changed = {**cut.attributes, module: kept}
        yield Mutation(
            "an attribute as it was",
            f"{module}.{key}",
            dataclasses.replace(cut, attributes=changed),
        )
    for field in ("scaled", "renormed"):
        for name in _some(list(getattr(cut, field)), each, rng):
            left = {k: v for k, v in getattr(cut, field).items() if k != name}
            yield Mutation("not rescaled", name, dataclasses.replace(cut, **{field: left}))


def _some(items: list[Any], each: int, rng: random.Random) -> list[Any]:
    return rng.sample(items, min(each, len(items)))


def _mutation(
    kind: str,
    cut: Cut,
    places: Sequence[tuple[str, int]],
    change: Callable[[Tensor, int, random.Random], Tensor],
    rng: random.Random,
) -> Mutation:
    kept = dict(cut.kept)
    for name, dim in places:
        dims = list(kept[name].dims)
        positions = dims[dim]
        assert positions is not None
        dims[dim] = change(positions, cut.before.tensors[name][dim], rng)
        kept[name] = kept[name]._replace(dims=tuple(dims))
    where = ", ".join(f"{name} {dim}" for name, dim in places)
    return Mutation(kind, where, dataclasses.replace(cut, kept=kept))


# -- what is wrong, and what passes -----------------------------------------------------------------


class Oracle:
    """Says whether a cut computes what the right one does; nothing of the proof is in it."""

    def __init__(self, model: nn.Module, example: Any, right: Cut) -> None:
        self.model, self.right, self.example = model, right, example
        torch.manual_seed(1)
        self.examples = [zoo.other_batch(_fresh(example), 3), _fresh(example)]
        self.wanted = self._outputs(right)

    def is_right(self, cut: Cut) -> bool:
        """Whether both cuts give one network, or this one is right in another way."""
        try:
            found = self._outputs(cut)
        except Exception:
            return False
        if _distance(self.wanted, found) < EQUAL:
            return True
        return self._is_exchange(cut)

    def _is_exchange(self, cut: Cut) -> bool:
        """Whether only the names of channels differ: the dense network stays the same with them exchanged."""
        for key in ("attributes", "scaled", "renormed"):
            if getattr(cut, key).keys() != getattr(self.right, key).keys():
                return False
        if cut.attributes != self.right.attributes:
            return False
        dense = copy.deepcopy(self.model)
        own = dict(named_tensors(dense))
        for name, kept in cut.kept.items():
            pairs = zip(self.right.kept[name].dims, kept.dims, strict=True)
            for dim, (places, other) in enumerate(pairs):
                if places is None or other is None or torch.equal(places, other):
                    continue
                if len(set(other.tolist())) < len(other):
                    return False
                rest = [
                    sorted(set(range(own[name].shape[dim])) - set(p.tolist()))
                    for p in (places, other)
                ]
                order = torch.empty(own[name].shape[dim], dtype=torch.long)
                order[[*places.tolist(), *rest[0]]] = torch.tensor([*other.tolist(), *rest[1]])
                own[name].data = own[name].data.index_select(dim, order)
        return _distance(self._run(self.model), self._run(dense)) < EQUAL

    def _outputs(self, cut: Cut) -> list[Tensor]:
        small = copy.deepcopy(self.model)
        cut.apply(small)
        return self._run(small)

    def _run(self, model: nn.Module) -> list[Tensor]:
        small = copy.deepcopy(model).eval().double()
        found = []
        for example in self.examples:
            (call,) = cast((as_call(example),), torch.float64)
            torch.manual_seed(0)
            with torch.no_grad():
                found += tensors(small(*call.args, **call.kwargs))
        return [t for t in found if t.is_floating_point()]


def _fresh(example: Any) -> Any:
    def noise(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return torch.randn_like(value) if floating else value

    return torch.utils._pytree.tree_map(noise, example)


def _distance(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    if [t.shape for t in wanted] != [t.shape for t in found]:
        return float("inf")
    pairs = zip(wanted, found, strict=True)
    return max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-300)) for a, b in pairs)


def passes(verifier: Verifier, cut: Cut) -> bool:
    try:
        verifier.equivalence(cut)
    except (BrokenModel, RuntimeError, ValueError, IndexError, AssertionError):
        return False
    return True


def tried(model: nn.Module, example: Any, *, each: int, seed: int = 0) -> dict[str, Any]:
    """Return how many wrong cuts of a network there were, and which of them passed."""
    distinct(model)
    started = time.perf_counter()
    found: dict[str, Any] = {"refused": "", "gone": 0.0, "wrong": {}, "equal": {}, "passed": []}
    calls = (as_call(example),)
    try:
        cut = plan(model.eval(), calls=calls, ratio=RATIO, select=Select())
    except NoEffect as error:
        return found | {"refused": str(error).splitlines()[0]}
    left_out = [c for c in cut.skipped if "does not compute" in c.what]
    found["refused"] = "; ".join(c.name for c in left_out)
    found["note"] = cut.notes[0]
    verifier, oracle = Verifier(model, calls), Oracle(model, example, cut)
    if not passes(verifier, cut):
        return found | {"refused": "all of it"}
    wrong, equal = Counter[str](), Counter[str]()
    for mutation in mutations(cut, random.Random(seed), each):
        if not passes(verifier, mutation.cut):
            wrong[mutation.kind] += 1  # or refused without need, which harms nobody
        elif oracle.is_right(mutation.cut):
            equal[mutation.kind] += 1
        else:
            wrong[mutation.kind] += 1
            found["passed"].append(f"{mutation.kind}: {mutation.where}")
    seconds = time.perf_counter() - started
    return found | {"wrong": dict(wrong), "equal": dict(equal), "seconds": round(seconds, 1)}


def made(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return NETS[name]() if name in NETS else zoo.build(name)


def table(found: dict[str, dict[str, Any]]) -> Table:
    rows = [
        (
            name,
            sum(row["wrong"].values()),
            len(row["passed"]),
            sum(row["equal"].values()),
            row["refused"] or "",
        )
        for name, row in found.items()
    ]
    return Table(("network", "wrong cuts", "passed", "equal to the right one", "refused"), rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", default="*", help="pattern of names")
    parser.add_argument("--each", type=int, default=6, help="changes of each kind, per network")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    installed = set(zoo.available())
    names = [*NETS, *(n for n in LARGE.split() if n in installed)]
    found = {}
    for name in (n for n in names if fnmatchcase(n, args.only)):
        try:
            found[name] = tried(*made(name), each=args.each)
        except Exception as error:
            found[name] = {"wrong": {}, "equal": {}, "passed": [], "refused": repr(error)[:80]}
        print(
            name,
            len(found[name]["passed"]),
            found[name]["passed"][:6],
            found[name]["refused"],
            found[name].get("note", "")[:6],
            found[name].get("seconds"),
            flush=True,
        )
    print(table(found))
    wrong = sum(sum(row["wrong"].values()) for row in found.values())
    passed = sum(len(row["passed"]) for row in found.values())
    print(f"{passed} of {wrong} wrong cuts pass, on {len(found)} networks")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if passed else 0


if __name__ == "__main__":
    sys.exit(main())
