"""Whole residual blocks, against networks built by hand without them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_accel.errors import BrokenModel, NoEffect, StructureMismatch
from lightning_accel.pruning import Params, mask_equivalence, plan, prune
from lightning_accel.pruning.blocks import Block as Found
from lightning_accel.pruning.blocks import cut_of, find_blocks
from lightning_accel.pruning.verify import Verifier
from lightning_accel.surgery import Cut, Select, Structure, follow, twin
from lightning_accel.surgery.bypass import Bypass, put_back
from lightning_accel.surgery.call import as_call

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(3))
IMAGES = torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(3))
TOKENS = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(3))


class Residual(nn.Module):
    """Pre-norm, with an argument that it may take."""

    def __init__(self, dim: int = 8, scale: float = 1.0) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(dim), nn.Linear(dim, 12)
        self.down = nn.Linear(12, dim)
        nn.init.normal_(self.down.weight, std=0.3 * scale)
        self.kind = "full"

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Alone(Residual):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Basic(nn.Module):
    """Of a ResNet: the sum goes through a ReLU."""

    def __init__(self, inputs: int = 8, outputs: int = 8, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.down = nn.Identity()
        if stride > 1:
            self.down = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.down(x))


class Tupled(nn.Module):
    """As of transformers: takes and gives tuples, and is called by names."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)

    def forward(
        self, hidden_states: Tensor, *, attention_mask: Tensor, position: Any = None
    ) -> tuple[Tensor, None]:
        x = self.norm(hidden_states)
        out = self.attn(x, x, x, key_padding_mask=attention_mask, need_weights=False)[0]
        return hidden_states + out, None


class Named(nn.Module):
    """Blocks held as attributes, in a ModuleList and in a ModuleDict, which give tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first = nn.Linear(8, 8), Tupled()
        self.layers = nn.ModuleList([Tupled() for _ in range(2)])
        self.more = nn.ModuleDict({"last": Tupled()})
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.zeros(x.shape[:2], dtype=torch.bool)
        x = self.embed(x)
        for block in (self.first, *self.layers, *self.more.values()):
            x, _ = block(hidden_states=x, attention_mask=mask)
        return self.head(x.mean(1))


class Mixer(nn.Module):
    """Each half of a block is a residual of its own."""

    class Half(nn.Module):
        def __init__(self, norm: int, size: int, turned: bool) -> None:
            super().__init__()
            self.norm, self.turned = nn.LayerNorm(norm), turned
            self.net = nn.Sequential(nn.Linear(size, 7), nn.GELU(), nn.Linear(7, size))

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return x + (self.net(y.mT).mT if self.turned else self.net(y))

    def __init__(self) -> None:
        super().__init__()
        halves = [self.Half(8, 5, True), self.Half(8, 8, False)]
        self.body = nn.Sequential(nn.Sequential(*halves), nn.Sequential(*copy.deepcopy(halves)))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(1))


def resnet() -> nn.Module:
    stem = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU())
    body = [Basic(), Basic(), Basic(8, 12, 2), Basic(12, 12)]
    return nn.Sequential(stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


def mlp(blocks: int = 3, kind: type[nn.Module] = Residual) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), *[kind() for _ in range(blocks)], nn.Linear(8, 3))


FAMILIES: dict[str, tuple[Callable[[], nn.Module], Tensor, list[str]]] = {
    "resnet": (resnet, IMAGES, ["1", "2", "4"]),
    "encoder": (encoder, TOKENS, ["layers.0", "layers.1", "layers.2"]),
    "named": (Named, TOKENS, ["first", "layers.0", "layers.1", "more.last"]),
    "mixer": (Mixer, TOKENS, ["body.0.0", "body.0.1", "body.1.0", "body.1.1"]),
    "mlp": (mlp, X, ["1", "2", "3"]),
}


def found(net: nn.Module, x: Any) -> tuple[list[str], dict[str, str]]:
    verifier = Verifier(twin(net), (as_call(x),))
    blocks, refused = find_blocks(net, verifier.settings, select=Select(), tolerance=1e-9)
    return [b.name for b in blocks], {c.name: c.what for c in refused}


class Without(nn.Module):
    """The truth: the module is not called, and what it would have got is handed on."""

    def __init__(self, gives_tuple: bool) -> None:
        super().__init__()
        self.gives_tuple = gives_tuple

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        return (x, None) if self.gives_tuple else x


def by_hand(net: nn.Module, *names: str) -> nn.Module:
    """Return a copy without these blocks, by the names of their parents."""
    made = copy.deepcopy(net)
    for name in names:
        parent, _, leaf = name.rpartition(".")
        block = made.get_submodule(name)
        without = Without(isinstance(block, Tupled))
        vars(without)["self_attn"] = getattr(block, "self_attn", None)  # which an encoder reads
        made.get_submodule(parent)._modules[leaf] = without
    return made


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_found_and_go(family: str) -> None:
    make, x, names = FAMILIES[family]
    net = make()
    assert found(net, x)[0] == names
    dense = copy.deepcopy(net)
    with torch.no_grad():
        expected = {name: by_hand(net, name).eval()(x) for name in names}
        wanted = dense.eval()(x)
    best = min(names, key=lambda name: float((expected[name] - wanted).norm()))
    before = dict(net.named_parameters())
    receipt = prune(net, example=x, ratio=1.01 / len(names), depth="only")
    assert [c.name for c in receipt.changes] == [best]
    assert all(p is before[n] for n, p in net.named_parameters())
    assert set(net.state_dict()) == {k for k in dense.state_dict() if not k.startswith(f"{best}.")}
    with torch.no_grad():
        assert torch.equal(net.eval()(x), expected[best])
    net.train()(x).sum().backward()  # type: ignore[no-untyped-call]


def test_a_stage_changing_block_stays_and_says_why() -> None:
    assert found(resnet(), IMAGES)[1] == {"3": "it gives another shape than it gets"}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda x, f: F.layer_norm(x + f, (8,)), "no plain skip"),
        (lambda x, f: 0.5 * x + f, "no plain skip"),
        (lambda x, f: x * torch.sigmoid(f), "no plain skip"),
        (lambda x, f: F.dropout(x + f, 0.5, True), "no plain skip"),
        (lambda x, f: x + F.softplus(f), "no plain skip"),
        (lambda x, f: (x + f, f), "no plain skip"),
        (lambda x, f: torch.cat((x + f, x), -1)[..., 1:9], "no plain skip"),
    ],
)
def test_what_does_something_to_its_input_is_no_block(change: Any, why: str) -> None:
    class Odd(Residual):
        def forward(self, x: Tensor, mask: Any = None) -> Any:
            out = change(x, self.down(F.gelu(self.up(self.norm(x)))))
            return out[0] if isinstance(out, tuple) and mask is None else out

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.head = nn.ModuleList([Odd(), Odd()]), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                out = block(x, x)
                x = out[0] if isinstance(out, tuple) else out
            return self.head(x)

    names, whys = found(Net(), X)
    assert not names and all(why in said for said in whys.values()) and len(whys) == 2
    with pytest.raises(NoEffect, match=r"no whole block can go\. Found: `blocks\.0`.*Do: leave"):
        prune(Net(), example=X, ratio=0.5, depth="only")


def test_a_stage_of_blocks_is_none_itself_but_one_with_weights_of_its_own_is() -> None:
    class Stage(nn.Module):
        def __init__(self, own: bool) -> None:
            super().__init__()
            self.blocks = nn.Sequential(Residual(), Residual())
            self.last = nn.Linear(8, 8) if own else nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            out = self.blocks(x)
            return out if isinstance(self.last, nn.Identity) else x + self.last(out)

    net = nn.Sequential(nn.Linear(8, 8), Stage(False), Stage(True), nn.Linear(8, 3))
    names = ["1.blocks.0", "1.blocks.1", "2", "2.blocks.0", "2.blocks.1"]
    assert found(net, X)[0] == names
    cut = cut_of(net, [Found(n, {"tensor": [0, "x"]}) for n in ("2.blocks.0", "2")])
    assert list(cut.bypassed) == ["2"]
    before, truth = Structure(bypassed=dict.fromkeys(["2", "2.blocks.1"])), by_hand(net, "2")
    for name in ("2.blocks.1", "2"):  # one after the other
        cut_of(net, [Found(name, {"tensor": [0, "x"]})]).apply(net)
    assert torch.equal(net(X), truth(X))
    fresh = nn.Sequential(nn.Linear(8, 8), Stage(False), Stage(True), nn.Linear(8, 3))
    state, whole = before.now(net), set(fresh.state_dict())
    state.apply(fresh)
    assert set(fresh.state_dict()) == set(net.state_dict())
    for one in (fresh, net):
        before.apply(one)
        assert set(one.state_dict()) == whole and before.now(one) == before


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm", "orthogonal", "old", "softplus"])
def test_blocks_of_weights_that_are_made_of_others_go(norm: str) -> None:
    class Made(Residual):
        def __init__(self) -> None:
            super().__init__()
            utils: Any = nn.utils if norm == "old" else nn.utils.parametrizations
            if norm == "softplus":
                self.scale = nn.Parameter(torch.zeros(8))
            else:
                getattr(utils, {"old": "spectral_norm"}.get(norm, norm))(self.down)

        def forward(self, x: Tensor, mask: Any = None) -> Tensor:
            return super().forward(x) + (F.softplus(self.scale) * x if norm == "softplus" else 0)

    net = mlp(kind=Made)
    before = net(X).detach()
    cut = plan(net, calls=[as_call(X)], ratio=0.4, depth="only")
    assert len(cut.bypassed) == 1 and mask_equivalence(net, cut, example=X) < 1e-12
    assert torch.equal(net.eval()(X), before) or norm in ("spectral_norm", "old")  # which iterate
    cut.apply(net)
    net.train()(X).sum().backward()  # type: ignore[no-untyped-call]


def test_a_skip_that_goes_on_in_float32_says_so() -> None:
    class Rounding(Residual):
        def forward(self, x: Tensor, mask: Any = None) -> Tensor:
            return super().forward(x).double() - x + x.float()

    names, whys = found(mlp(kind=Rounding), X)
    assert not names and len(whys) == 3
    assert all("another number format" in why for why in whys.values())


def test_dropout_after_the_sum_shows_in_training_only() -> None:
    class Odd(Residual):
        def forward(self, x: Tensor, mask: Any = None) -> Tensor:
            return F.dropout(super().forward(x), 0.5, self.training)

    assert found(mlp(kind=Odd).eval(), X)[0] == []


def test_a_first_block_behind_no_relu_is_not_like_the_others() -> None:
    """`relu(x + f(x))` hands on what it gets only where that is not negative."""
    net = nn.Sequential(nn.Conv2d(8, 8, 1), Basic(), Basic(), nn.Flatten(), nn.Linear(288, 2))
    names, whys = found(net, IMAGES)
    assert names == ["2"] and list(whys) == ["1"]


class Hung(nn.Module):
    """A network in which something hangs on each block but the last two."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Residual() for _ in range(6)])
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            x = block(x) if block.kind == "full" else x
        return self.head(x), self.blocks[2].up.weight.sum()


def test_what_hangs_on_a_block_keeps_it() -> None:
    net = Hung()
    net.blocks[0].up.bias.requires_grad_(False)
    net.blocks[1].down.register_forward_hook(lambda *_: None)
    cut = plan(
        net,
        calls=[as_call(X)],
        ratio=0.999,
        depth="only",
        select=Select(exclude=("blocks.3.up",)),
    )
    whys = {change.name: change.what for change in cut.skipped}
    assert len(cut.bypassed) == 1 and set(cut.bypassed) <= {"blocks.4", "blocks.5"}
    assert whys["blocks.0"] == "`blocks.0.up.bias` is frozen"
    assert whys["blocks.1"] == "a hook reads `blocks.1.down`"
    assert "`weight` of a Linear that was pruned away is read" in whys["blocks.2"]
    assert whys["blocks.3"] == "not among what `select` chooses"


def test_a_step_that_reads_a_weight_keeps_its_block() -> None:
    class Penalty:
        name, trains = "training_step", True

        def __call__(self, model: Any, cut: Cut) -> None:
            model = twin(model)
            cut.apply(model)
            (model(X).sum() + model[2].up.weight.square().sum()).backward()

    cut = plan(mlp(), calls=[as_call(X)], ratio=0.999, depth="only", steps=[Penalty()])
    assert set(cut.bypassed) < {"1", "3"}
    assert "training_step" in {c.name: c.what for c in cut.skipped}["2"]


def test_a_hook_on_a_block_stays_in_its_place() -> None:
    net = mlp()
    seen: list[Tensor] = []
    handle = net[2].register_forward_hook(lambda module, args, output: output * 2)
    net[2].register_forward_hook(lambda module, args, output: seen.append(output))
    shallow(net, "1", "2", "3")
    inside = net[0](X)
    assert torch.equal(net(X), net[4](2 * inside)) and torch.equal(seen[-1], 2 * inside)
    handle.remove()
    assert torch.equal(net(X), net[4](inside))


def test_a_block_called_twice_and_held_twice_goes_everywhere() -> None:
    class Looped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.loop, self.other = nn.Linear(8, 8), Residual(), Residual()
            self.layers = nn.ModuleList([self.loop, self.other, self.loop])

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for layer in (*self.layers, self.loop):
                x = layer(x)
            return x

    net = Looped()
    nn.init.normal_(net.other.down.weight, std=10)
    truth = by_hand(net, "loop", "layers.0", "layers.2")
    prune(net, example=X, ratio=0.5, depth="only")
    assert net.loop is net.layers[0] is net.layers[2] and isinstance(net.loop, Bypass)
    assert torch.equal(net(X), truth(X))


def test_a_weight_that_others_share_stays_theirs() -> None:
    net = mlp()
    net[4] = nn.Linear(12, 8)
    net[4].weight = net[2].down.weight
    net.append(nn.Linear(8, 3))
    net[3] = nn.Linear(8, 12)
    truth = by_hand(net, "2")
    receipt = cut_of(net, [Found("2", {"tensor": [0, "x"]})]).apply(net)
    assert "2.down.bias" in (gone := {r.name for r in receipt.removed}) and len(gone) == 5
    assert net[4].weight.untyped_storage().nbytes() == 4 * 12 * 8
    assert torch.equal(net(X), truth(X))


# --- what is left ---------------------------------------------------------------------------------


def shallow(net: nn.Module, *names: str) -> nn.Module:
    verifier = Verifier(twin(net), (as_call(X),))
    blocks = find_blocks(net, verifier.settings, select=Select(), tolerance=1e-9).found
    cut_of(net, [b for b in blocks if b.name in names]).apply(net)
    return net


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_what_is_left_is_copied_saved_scripted_exported_and_compiled() -> None:
    net = shallow(mlp(kind=Alone), "1", "3")
    expected = net(X)
    file = io.BytesIO()
    torch.save(net, file)
    assert len(file.getvalue()) < 30_000
    file.seek(0)
    for made in (
        copy.deepcopy(net),
        torch.load(file, weights_only=False),
        torch.jit.script(net),
        torch.export.export(net, (X,)).module(),
        torch.compile(net, backend="eager", fullgraph=True),
    ):
        assert torch.equal(made(X), expected)
    many = shallow(mlp(), "1", "3")
    assert torch.equal(torch.compile(many, backend="eager", fullgraph=True)(X), many(X))
    assert torch.equal(many[1](X, mask=None), X) and many[1].kind == "full"


def test_a_block_comes_back_as_it_was_but_for_its_values() -> None:
    net = mlp()
    net[2].register_buffer("table", torch.arange(3.0), persistent=False)
    dense, parameters = copy.deepcopy(net), list(net.named_parameters())
    shallow(net, "1", "2")
    assert net.double()[2].husk.block.up.weight.dtype == torch.float64
    held = net.float()[2].husk.block.up.weight
    assert held.untyped_storage().nbytes() == 4 and held.shape == (12, 8)
    copied = copy.deepcopy(net)
    for one in (net, copied):
        put_back(one, ["1", "2"])
        one.load_state_dict(dense.state_dict())
        assert torch.equal(one(X), dense(X)) and torch.equal(one[2].table, torch.arange(3.0))
    assert all(a is b for (_, a), (_, b) in zip(parameters, net.named_parameters(), strict=True))
    assert not any(a is b for a, b in zip(net.parameters(), copied.parameters(), strict=True))


def test_a_structure_goes_both_ways_and_is_checked() -> None:
    net, other = mlp(), mlp()
    before = Structure(bypassed={"2": {"tensor": [0, "x"]}}).built(net)
    assert before.tensors["2.up.weight"] == (12, 8) and before.bypassed == {"2": None}
    shallow(net, "2")
    structure = before.now(net)
    assert Structure.from_dict(structure.to_dict()) == structure and not structure.tensors
    structure.check(other)
    structure.apply(other)
    assert set(other.state_dict()) == set(net.state_dict())
    before.apply(other)
    assert before.now(other) == before
    with pytest.raises(StructureMismatch, match="names a block that the model lacks"):
        structure.check(nn.Sequential(nn.Linear(8, 8)))
    plain = structure.to_dict()
    plain["bypassed"]["2"] = {"call": "os.system"}
    with pytest.raises(StructureMismatch, match="how a block that is gone hands on"):
        Structure.from_dict(plain)


def test_the_optimizer_lets_go_and_goes_on() -> None:
    """As one that never had the block's parameters, with the same groups."""
    net = mlp()
    groups = [{"params": list(net[n].parameters()), "lr": 0.1 * (n + 1)} for n in range(5)]
    adam = torch.optim.AdamW(groups)
    for _ in range(3):
        adam.zero_grad()
        net(X).square().sum().backward()
        adam.step()
    verifier = Verifier(twin(net), (as_call(X),))
    blocks = find_blocks(net, verifier.settings, select=Select("2"), tolerance=1e-9).found
    state = {n: {k: v.clone() for k, v in adam.state[p].items()} for n, p in net.named_parameters()}
    receipt = cut_of(net, blocks).apply(net)
    follow(adam, receipt)
    assert [len(g["params"]) for g in adam.param_groups] == [2, 6, 0, 6, 2]
    assert [g["lr"] for g in adam.param_groups] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert len(adam.state) == 16
    for name, parameter in net.named_parameters():
        assert all(torch.equal(state[name][k], v) for k, v in adam.state[parameter].items())
    adam.zero_grad()
    net(X).square().sum().backward()
    adam.step()


# --- the proof ------------------------------------------------------------------------------------


WRONG: dict[str, Any] = {
    "another argument": {"tensor": [1, "y"]},
    "doubled": {"tuple": [{"tensor": [0, "x"]}, {"tensor": [0, "x"]}]},
    "nothing": {"value": None},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_proof_refuses_a_block_handed_on_wrongly(wrong: str) -> None:
    class Two(Residual):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            return super().forward(x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.head = nn.ModuleList([Two(), Two()]), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x, x.flip(-1))
            return self.head(x)

    net = Net()
    right = cut_of(net, [Found("blocks.1", {"tensor": [0, "x"]})])
    assert mask_equivalence(net, right, example=X) < 1e-12
    cut = cut_of(net, [Found("blocks.1", WRONG[wrong])])
    with contextlib.suppress(BrokenModel):
        assert not mask_equivalence(net, cut, example=X) < 1e-3


@pytest.mark.parametrize("make", [Basic, lambda: nn.LayerNorm(8), lambda: nn.Linear(8, 8)])
def test_the_proof_refuses_what_is_no_block(make: Any) -> None:
    images = isinstance(make(), Basic)
    first = nn.Conv2d(8, 8, 1) if images else nn.Linear(8, 8)
    net = nn.Sequential(first, make(), nn.Conv2d(8, 8, 1) if images else nn.Linear(8, 8))
    cut = cut_of(net, [Found("1", {"tensor": [0, "input"]})])
    assert mask_equivalence(net, cut, example=IMAGES if images else X) > 1e-3


def test_width_is_proved_beside_depth() -> None:
    net = mlp()
    cut = plan(net, calls=[as_call(X)], target=Params(0.3), depth=True)
    assert cut.bypassed and cut.kept
    assert mask_equivalence(net, cut, example=X) < 1e-12
    name = next(n for n in cut.kept if n.endswith("up.weight"))
    rows, *rest = cut.kept[name].dims
    assert rows is not None
    other = {**cut.kept, name: cut.kept[name]._replace(dims=(rows.flip(0), *rest))}
    assert mask_equivalence(net, dataclasses.replace(cut, kept=other), example=X) > 1e-3


def test_what_a_block_keeps_of_its_last_forward_hangs_on_no_graph() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.kept = nn.Linear(8, 8), None

        def forward(self, x: Tensor) -> Tensor:
            self.kept: Any = {"maps": [self.up(x)]}
            return x + self.kept["maps"][0].relu()

    net = nn.Sequential(nn.Linear(8, 8), Keeps(), Keeps(), nn.Linear(8, 2)).double()
    example = torch.randn(4, 8, dtype=torch.float64)
    net(example).sum().backward()
    prune(net, example=example, ratio=0.5, depth="only")
    with torch.no_grad():  # so that the block that is left keeps no graph either
        output = net(example)
    assert torch.equal(copy.deepcopy(net)(example), output)
