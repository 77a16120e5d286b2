"""Files of networks: what they answer, what is refused, and what lies on the disk afterwards."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import lightning_accel
from lightning_accel import Bundle, Deploy, load_bundle
from lightning_accel.cli import main
from lightning_accel.errors import AccelError, Unsupported
from lightning_accel.export import backends, gates, manifest, place, speed
from lightning_accel.export.candidate import Candidate, choose, kept_formats
from lightning_accel.export.gates import Case, proved
from lightning_accel.export.manifest import BadBundle
from lightning_accel.export.samples import Sample, samples
from lightning_accel.export.speed import Pace
from lightning_accel.measure.race import Ratio

deploy = partial(lightning_accel.deploy, budget_s=0.02)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


def conv() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(72, 5)
    )
    net(torch.randn(16, 3, 5, 5))  # running statistics that are not 0 and 1
    return net.eval()


class Pair(NamedTuple):
    logits: Tensor
    features: Tensor | None


@dataclasses.dataclass
class Answer:
    logits: Tensor
    loss: Tensor | None = None


class Words(nn.Module):
    """Token numbers and a mask in, whatever `give` makes of two tensors out."""

    def __init__(self, give: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head, self.give = nn.Embedding(11, 8), nn.Linear(8, 4), give

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Any:
        found = self.table(ids)
        if mask is not None:
            found = found * mask.unsqueeze(-1)
        pooled = found.mean(1)
        return self.give(self.head(pooled), pooled)


def tokens(batch: int = 4, length: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(0, 11, (batch, length), generator=generator)


FORMATS = ("export", "onnx")


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_a_bundle_answers_as_the_model_at_every_batch(tmp_path: Path, format: str) -> None:
    net = conv()
    bundle = deploy(net, torch.randn(4, 3, 5, 5), to=tmp_path / "net", formats=format)
    assert bundle.format == format
    for batch in (1, 2, 4, 9):
        x = torch.randn(batch, 3, 5, 5)
        close(bundle.predict(x), net(x.clone()))
        close(bundle.predict(x.numpy()), net(x.clone()))


@pytest.mark.slow
def test_machine_code_answers_as_the_model_and_says_whose_processor_it_is_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = conv()
    bundle = deploy(net, torch.randn(4, 3, 5, 5), to=tmp_path / "net", formats=("aoti", "onnx"))
    assert set(bundle.manifest["formats"]) == {"aoti", "onnx"}
    machine = load_bundle(bundle.path, format="aoti")
    for batch in (1, 3, 4):
        x = torch.randn(batch, 3, 5, 5)
        kept = x.clone()
        close(machine.predict(x), net(x.clone()))
        close(machine.predict(x.flip(0).transpose(2, 3)), net(x.flip(0).transpose(2, 3).clone()))
        assert torch.equal(x, kept)
    assert bundle.manifest["host"]["capability"] == torch.backends.cpu.get_cpu_capability()
    there = {**manifest.host(), "capability": "another"}
    monkeypatch.setattr(manifest, "host", lambda: there)
    with pytest.raises(AccelError, match="capability another here"):
        load_bundle(bundle.path, format="aoti")
    written = json.loads((bundle.path / "manifest.json").read_text())
    written["format"] = "aoti"
    (bundle.path / "manifest.json").write_text(json.dumps(written))
    with pytest.warns(UserWarning, match=r"runs as 'onnx', not as 'aoti'.*capability"):
        portable = load_bundle(bundle.path)
    assert portable.format == "onnx" and not portable.faster
    close(portable.predict(x), net(x.clone()))


@pytest.mark.slow
def test_machine_code_is_frozen(tmp_path: Path) -> None:
    net = conv()
    bundle = deploy(
        net, torch.randn(4, 3, 5, 5), to=tmp_path / "net", formats="aoti", dynamic=False
    )
    from zipfile import ZipFile

    with ZipFile(bundle.path / "model.aoti.pt2") as held:
        code = "".join(held.read(n).decode() for n in held.namelist() if n.endswith(".wrapper.cpp"))
    assert "_frozen_param" in code


def test_arguments_and_answers_keep_their_structure(tmp_path: Path) -> None:
    net = Words(
        lambda logits, pooled: {"logits": logits, "more": [pooled, (logits * 2,)], "name": "w"}
    )
    ids = tokens()
    bundle = deploy(net, {"ids": ids, "mask": torch.ones(4, 5)}, to=tmp_path / "a", formats=FORMATS)
    for format in FORMATS:
        found = load_bundle(bundle.path, format=format).predict(ids=ids, mask=torch.ones(4, 5))
        wanted = net(ids, torch.ones(4, 5))
        assert list(found) == ["logits", "more", "name"] and found["name"] == "w"
        assert isinstance(found["more"], list) and isinstance(found["more"][1], tuple)
        close(found["logits"], wanted["logits"])
        close(found["more"][0], wanted["more"][0])
        close(found["more"][1][0], wanted["more"][1][0])
    found = bundle.predict(ids, torch.ones(4, 5))  # by place as well
    close(found["logits"], wanted["logits"])


def test_named_tuples_come_back_as_their_class_or_as_one_like_it(tmp_path: Path) -> None:
    net, ids = Words(lambda logits, pooled: Pair(logits, None)), tokens()
    bundle = deploy(net, ids, to=tmp_path / "a", formats="export")
    assert type(bundle.predict(ids)) is Pair
    found = load_bundle(bundle.path).predict(ids)
    assert type(found) is not Pair and type(found).__name__ == "Pair"
    assert found._fields == ("logits", "features") and found.features is None
    assert type(load_bundle(bundle.path, classes=[Pair]).predict(ids)) is Pair
    close(found.logits, net(ids).logits)


def test_dataclasses_come_back_without_what_was_not_given(tmp_path: Path) -> None:
    net, ids = Words(lambda logits, pooled: Answer(logits)), tokens()
    bundle = deploy(net, (ids,), to=tmp_path / "a", formats="export")
    found = bundle.predict(ids)
    assert type(found) is Answer and found.loss is None
    close(found.logits, net(ids).logits)
    close(load_bundle(bundle.path).predict(ids).logits, net(ids).logits)


def test_a_further_size_may_vary(tmp_path: Path) -> None:
    net = Words(lambda logits, pooled: logits)
    example = {"ids": tokens(), "mask": torch.ones(4, 5)}
    dynamic = {"ids": {1: "length"}, "mask": {1: "length"}}
    bundle = deploy(net, example, to=tmp_path / "a", formats=FORMATS, dynamic=dynamic)
    for format in FORMATS:
        opened = load_bundle(bundle.path, format=format)
        for batch, length in ((1, 1), (2, 9), (5, 3)):
            ids, mask = tokens(batch, length), torch.rand(batch, length)
            close(opened.predict(ids=ids, mask=mask), net(ids, mask))
    with pytest.raises(ValueError, match="the same length as the others, 5"):
        bundle.predict(ids=tokens(4, 5), mask=torch.ones(4, 6))
    with pytest.raises(ValueError, match="same batch"):
        bundle.predict(ids=tokens(4, 5), mask=torch.ones(3, 5))


def test_a_batch_that_is_written_into_the_code_is_said_and_kept(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).view(4, 2)

    net, x = Fixed(), torch.randn(4, 6)
    with pytest.warns(
        UserWarning, match=r"the batch is part of the graph.*only the sizes of the example"
    ):
        bundle = deploy(net, x, to=tmp_path / "a", formats=FORMATS)
    close(bundle.predict(x), net(x))
    assert bundle.manifest["signature"]["inputs"][0]["shape"] == [4, 6]
    assert any("only the sizes of the example" in note for note in bundle.manifest["notes"])
    with pytest.raises(ValueError, match=r"has the size 4 in dimension 0.*sizes \(3, 6\)"):
        bundle.predict(x[:3])
    with pytest.raises(Unsupported, match="cannot be traced with these sizes open"):
        deploy(net, x, to=tmp_path / "b", formats="export", dynamic={"x": {0: "batch"}})
    assert not (tmp_path / "b").exists()


def test_an_example_of_one_sample_leaves_the_batch_open(tmp_path: Path) -> None:
    net = mlp()
    bundle = deploy(net, torch.randn(1, 6), to=tmp_path / "a", formats=FORMATS)
    x = torch.randn(7, 6)
    close(bundle.predict(x), net(x))


def test_the_largest_batch_is_a_bound(tmp_path: Path) -> None:
    bundle = deploy(mlp(), torch.randn(4, 6), to=tmp_path / "a", formats="export", batch=8)
    assert bundle.predict(torch.randn(8, 6)).shape == (8, 3)
    with pytest.raises(ValueError, match="a batch from 1 to 8"):
        bundle.predict(torch.randn(9, 6))
    with pytest.raises(ValueError, match="a batch from 1 to 8"):
        bundle.predict(torch.randn(0, 6))


def test_what_comes_before_and_after_is_part_of_the_graph(tmp_path: Path) -> None:
    class Scale(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.float() - 5) / 3

    net, pixels = mlp(), torch.randint(0, 255, (4, 6), dtype=torch.uint8)
    bundle = deploy(
        net, pixels, to=tmp_path / "a", formats=FORMATS, pre=Scale(), post=nn.Softmax(-1)
    )
    for format in FORMATS:
        found = load_bundle(bundle.path, format=format).predict(pixels)
        close(found, F.softmax(net((pixels.float() - 5) / 3), -1))


def test_the_users_model_stays_as_it_is_and_in_its_mode(tmp_path: Path) -> None:
    net = conv().train()
    seen: list[Any] = []
    net.register_forward_hook(lambda *_: seen.append(1))
    net[0].weight.grad = torch.ones_like(net[0].weight)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    random, example = torch.get_rng_state(), torch.randn(4, 3, 5, 5)
    random, kept = torch.get_rng_state(), example.clone()
    bundle = deploy(net, example, to=tmp_path / "a", formats="export")
    assert torch.equal(torch.get_rng_state(), random) and torch.equal(example, kept)
    assert all(module.training for module in net.modules()) and not seen
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters()) and bool(net[0].weight.grad.all())
    close(bundle.predict(example), net.eval()(example.clone()))


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_passed_stays_as_it_is_where_the_model_itself_writes_into_it(
    tmp_path: Path, format: str
) -> None:
    net, example = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 3)), torch.randn(4, 6)
    kept = example.clone()
    bundle = deploy(net, example, to=tmp_path / "a", formats=format)
    x = torch.randn(5, 6)
    before = x.clone()
    close(bundle.predict(x), net(before.clone()))
    assert torch.equal(x, before) and torch.equal(example, kept)


def test_the_precision_that_a_process_is_set_to_is_put_back_and_not_measured(
    tmp_path: Path,
) -> None:
    seen: list[str] = []
    known = torch.get_float32_matmul_precision()

    def metric(predict: Any) -> float:
        seen.append(torch.get_float32_matmul_precision())
        return 1.0

    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            deploy(
                mlp(),
                torch.randn(4, 6),
                to=tmp_path / "a",
                formats="export",
                metric=metric,
                max_drop=0.0,
            )
        assert torch.get_float32_matmul_precision() == "medium" and set(seen) == {"highest"}
    finally:
        torch.set_float32_matmul_precision(known)


def test_a_hook_that_takes_part_in_the_forward_is_deployed(tmp_path: Path) -> None:
    net, x = mlp(), torch.randn(4, 6)
    net[0].register_forward_hook(lambda module, args, output: output + 1)
    bundle = deploy(net, x, to=tmp_path / "a", formats="export")
    close(bundle.predict(x), net(x))


def test_nothing_of_the_example_is_in_the_files(tmp_path: Path) -> None:
    x = torch.full((4, 6), 0.123456789)
    bundle = deploy(mlp(), x, to=tmp_path / "a", formats=FORMATS)
    secret = np.float32(0.123456789).tobytes() * 2
    assert not [p.name for p in bundle.path.iterdir() if secret in p.read_bytes()]


def test_half_precision_weights_are_deployed_in_float32(tmp_path: Path) -> None:
    net, x = mlp().bfloat16(), torch.randn(4, 6)
    bundle = deploy(net, x.bfloat16(), to=tmp_path / "a", formats="export")
    close(bundle.predict(x), net.float()(x))
    assert "weights in bfloat16 are deployed in float32" in bundle.manifest["notes"]


def test_arguments_that_are_no_tensors_become_part_of_the_graph(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, factor: float, plus: bool = False) -> Tensor:
            return x * factor + (1 if plus else 0)

    bundle = deploy(Scaled(), (torch.randn(4, 6), 3.0), to=tmp_path / "a", formats="export")
    close(bundle.predict(torch.ones(2, 6), 3.0), torch.full((2, 6), 3.0))
    with pytest.raises(ValueError, match=r"`factor` is part of the graph.*Found: 2.0"):
        bundle.predict(torch.ones(2, 6), 2.0)
    with pytest.raises(TypeError, match="the arguments are those of the example"):
        bundle.predict(torch.ones(2, 6), 3.0, plus=True)


CALLS: dict[str, tuple[Callable[[Bundle], Any], type[Exception], str]] = {
    "too few": (lambda b: b.predict(), TypeError, "none instead of input"),
    "too many": (
        lambda b: b.predict(torch.ones(2, 6), 1),
        TypeError,
        "1 arguments that need no name",
    ),
    "unknown name": (lambda b: b.predict(y=torch.ones(2, 6)), TypeError, "y instead of input"),
    "twice": (lambda b: b.predict(torch.ones(2, 6), input=1), TypeError, "passed once"),
    "no tensor": (
        lambda b: b.predict([1.0]),
        TypeError,
        "`input` is a tensor or an array. Found: list",
    ),
    "another type": (
        lambda b: b.predict(torch.ones(2, 6, dtype=torch.float64)),
        TypeError,
        "float64",
    ),
    "an array of another type": (lambda b: b.predict(np.ones((2, 6))), TypeError, "float64"),
    "another rank": (lambda b: b.predict(torch.ones(6)), ValueError, "has 2 dimensions"),
    "another size": (lambda b: b.predict(torch.ones(2, 7)), ValueError, "size 6 in dimension 1"),
    "no samples": (lambda b: b.predict(torch.ones(0, 6)), ValueError, "batch at least 1"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return deploy(
            mlp(), torch.randn(4, 6), to=tmp_path_factory.mktemp("b") / "net", formats=FORMATS
        )


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_does_not_fit_is_refused_in_words(written: Bundle, name: str) -> None:
    call, kind, said = CALLS[name]
    with pytest.raises(kind, match=said):
        call(written)


def test_the_manifest_says_what_an_independent_reader_finds(written: Bundle) -> None:
    import onnx

    plain = json.loads((written.path / "manifest.json").read_text())
    assert plain == written.manifest
    assert set(plain["files"]) == {"README.md", "model.pt2", "model.onnx"}
    for name, about in plain["files"].items():
        data = (written.path / name).read_bytes()
        assert about == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    network = onnx.load(written.path / "model.onnx")
    assert [i.name for i in network.graph.input] == [
        i["name"] for i in plain["signature"]["inputs"]
    ]
    assert [o.name for o in network.graph.output] == ["output"]
    assert plain["signature"]["outputs"] == [
        {"name": "output", "dtype": "float32", "shape": ["batch", 3]}
    ]
    assert plain["host"]["torch"] == torch.__version__
    rows = {row["format"]: row for row in plain["candidates"]}
    assert set(rows) == {"eager", *FORMATS} and set(rows["onnx"]["paces"]) == {"4", "1"}
    assert all(rows[name]["num_inputs"] >= 64 for name in FORMATS)
    assert written.table.splitlines()[0] in (written.path / "README.md").read_text()
    assert "batch 4 (ms)" in written.table and str(written) == repr(written)


def test_the_onnx_file_computes_what_numpy_does(written: Bundle) -> None:
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(written.path / "model.onnx").graph
    arrays = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    first, second = (arrays[f"model.{n}.weight"] for n in (0, 2))
    x = np.random.default_rng(0).standard_normal((5, 6), dtype=np.float32)
    hidden = np.maximum(x @ first.T + arrays["model.0.bias"], 0)
    wanted = hidden @ second.T + arrays["model.2.bias"]
    for format in FORMATS:
        found = load_bundle(written.path, format=format).predict(x)
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_what_recurrent_and_channels_last_networks_make_exporters_say_is_kept_back(
    tmp_path: Path,
) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(6, 8, batch_first=True)

        def forward(self, x: Tensor) -> Any:
            return self.layer(x)

    x = torch.randn(4, 5, 6)
    net = Recurrent()
    bundle = deploy(net, x, to=tmp_path / "a", formats="export")
    (found, (hidden, _)), (wanted, (known, _)) = bundle.predict(x[:3]), net(x[:3])
    close(found, wanted)
    close(hidden, known)
    shapes = [output["shape"] for output in bundle.manifest["signature"]["outputs"]]
    assert shapes == [["batch", 5, 8], [1, "batch", 8], [1, "batch", 8]]
    last = conv().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    image = torch.randn(4, 3, 5, 5)
    close(
        deploy(last, image, to=tmp_path / "b", formats="export").predict(image), last(image.clone())
    )


# Gates, each with the fault that it is for.


def cases(net: nn.Module, example: Tensor, usual_only: bool = False) -> list[Case]:
    found = []
    for sample in samples([example], [{0: "batch"}], [{"batch": 4}, {"batch": 1}]):
        if sample.usual or not usual_only:
            with torch.no_grad():
                found.append(Case(sample, (net(sample.tensors[0].clone()),)))
    return found


def runner(net: nn.Module) -> Any:
    def run(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (net(tensors[0].clone()),)

    return run


def test_the_model_itself_passes_all_gates() -> None:
    net = mlp()
    found = proved(runner(net), cases(net, torch.randn(4, 6)))
    assert found.reason == "" and found.num_inputs >= 64 and found.max_abs_error == 0


@pytest.mark.parametrize("layer", [0, 2])
def test_one_weight_off_by_a_hundredth_is_refused(layer: int) -> None:
    net, wrong = conv(), conv()
    with torch.no_grad():
        weight = wrong[0].weight if layer == 0 else wrong[4].weight
        weight.view(-1)[weight.abs().argmax()] *= 1.01
    found = proved(runner(wrong), cases(net, torch.randn(4, 3, 5, 5)))
    assert "another answer than the model" in found.reason


def test_one_wrong_element_among_many_is_refused() -> None:
    net, x = nn.Identity(), torch.randn(4, 4000)

    def wrong(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        answer = tensors[0].clone()
        answer[..., 7] *= 1.01
        return (answer,)

    case = Case(Sample("x", [x]), (net(x),))
    assert gates.sqnr_db(x, wrong([x])[0]) > gates.FLOOR_DB  # the ratio alone does not see it
    assert "another answer than the model" in proved(wrong, [case]).reason


def test_a_back_end_that_writes_into_its_input_is_refused() -> None:
    net = mlp()

    def wrong(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        answer = runner(net)(tensors)
        tensors[0].view(-1)[0] += 1e-7 if tensors[0].is_contiguous() else 0
        tensors[0].flatten()
        tensors[0].mul_(0.5)
        return answer

    assert proved(wrong, cases(net, torch.randn(4, 6), True)).reason.startswith(
        "it writes into its input"
    )


def test_a_second_call_that_differs_is_refused() -> None:
    net, calls = mlp(), [0]

    def wrong(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        calls[0] += 1
        answer = runner(net)(tensors)[0]
        return (answer if calls[0] % 2 else torch.nextafter(answer, answer + 1),)

    assert proved(wrong, cases(net, torch.randn(4, 6))).reason.startswith(
        "the second call answers diff"
    )


def test_an_answer_that_the_next_call_overwrites_is_refused() -> None:
    kept = torch.zeros(2, 3)
    calls = [0]

    def wrong(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        calls[0] += 1
        if calls[0] == 2:
            kept.mul_(7)
            return (tensors[0] * 2,)
        kept.copy_(tensors[0] * 2)
        return (kept,)

    x = torch.randn(2, 3)
    assert (
        "a later call changes an earlier answer"
        in proved(wrong, [Case(Sample("x", [x]), (x * 2,))]).reason
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_has_to_agree(value: float) -> None:
    x = torch.randn(4, 6)
    broken = x.clone()
    broken[0, 0] = value
    good, bad = Case(Sample("x", [x]), (x,)), Case(Sample("x", [x]), (broken,))
    assert "it is not finite where" in proved(lambda t: (broken.clone(),), [good]).reason
    assert "it is not finite where" in proved(lambda t: (x.clone(),), [bad]).reason
    assert proved(lambda t: (broken.clone(),), [bad]).reason == ""
    other = broken.clone()
    other[0, 0] = float("-inf")
    assert "it is not finite where" in proved(lambda t: (other,), [bad]).reason


def test_whole_numbers_have_to_be_equal_by_their_share() -> None:
    x = torch.arange(1000).view(10, 100)
    case = Case(Sample("x", [x]), (x,))

    def off(count: int) -> Any:
        return lambda t: (torch.where(x < count, x + 1, x),)

    assert proved(off(10), [case]).reason == "" and proved(off(10), [case]).agreement == 0.99
    assert "98.90% of whole numbers" in proved(off(11), [case]).reason


def test_another_size_type_or_number_and_an_error_are_refused() -> None:
    x = torch.randn(4, 6)
    case = [Case(Sample("x", [x]), (x,))]
    assert "float64" in proved(lambda t: (x.double(),), case).reason
    assert "(4, 5)" in proved(lambda t: (x[:, :5],), case).reason
    assert "2 tensors" in proved(lambda t: (x, x), case).reason
    assert "ZeroDivisionError" in proved(lambda t: (x / (1 // 0),), case).reason


def test_inputs_reach_the_edges_and_stay_in_the_range_of_whole_numbers() -> None:
    ids, x = tokens(4, 5) + 3, torch.randn(4, 6)
    found = list(
        samples([ids, x], [{0: "batch"}, {0: "batch"}], [{"batch": 4}, {"batch": 1}, {"batch": 8}])
    )
    assert len(found) >= 64
    assert {s.tensors[0].shape[0] for s in found} == {1, 4, 8}
    assert all(int(s.tensors[0].min()) >= int(ids.min()) for s in found)
    assert all(int(s.tensors[0].max()) <= int(ids.max()) for s in found)
    assert any(not s.tensors[1].any() for s in found)
    assert any(float(s.tensors[1].max()) > 500 for s in found)
    assert any(float(s.tensors[1].min()) < -500 and float(s.tensors[1].max()) <= 0 for s in found)
    assert any(not s.tensors[1].is_contiguous() for s in found)
    again = list(
        samples([ids, x], [{0: "batch"}, {0: "batch"}], [{"batch": 4}, {"batch": 1}, {"batch": 8}])
    )
    assert all(torch.equal(a.tensors[1], b.tensors[1]) for a, b in zip(found, again, strict=True))


# Faults planted into a deployment.


class Spoiled:
    """A back end whose runner is changed after it was opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def __call__(self, name: str, change: Callable[[Any], Any]) -> None:
        known = backends.FORMATS[name]
        spoiled = known._replace(load=lambda path, schema: change(known.load(path, schema)))
        self.monkeypatch.setitem(backends.FORMATS, name, spoiled)


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Spoiled:
    return Spoiled(monkeypatch)


def test_a_wrong_format_is_left_out_with_its_reason(tmp_path: Path, spoil: Spoiled) -> None:
    spoil("onnx", lambda run: lambda tensors: tuple(1.01 * t for t in run(tensors)))
    spoil("aoti", lambda run: run)
    backends.FORMATS["aoti"] = backends.FORMATS["aoti"]._replace(missing=lambda: "no C++ compiler")
    bundle = deploy(mlp(), torch.randn(4, 6), to=tmp_path / "a")
    assert bundle.format == "export" and set(bundle.manifest["formats"]) == {"export"}
    rows = {row["format"]: row for row in bundle.manifest["candidates"]}
    assert "another answer than the model" in rows["onnx"]["reason"]
    assert "no C++ compiler" in rows["aoti"]["reason"]
    assert "aoti was refused" in bundle.table and "no C++ compiler" in bundle.table
    assert not (bundle.path / "model.onnx").exists()


def test_a_format_that_was_named_has_to_come_through(tmp_path: Path, spoil: Spoiled) -> None:
    spoil("onnx", lambda run: lambda tensors: tuple(1.01 * t for t in run(tensors)))
    with pytest.raises(AccelError, match=r"asked for does not come through.*onnx: another answer"):
        deploy(mlp(), torch.randn(4, 6), to=tmp_path / "deep" / "a", formats=FORMATS)
    with pytest.raises(AccelError, match="no format comes through"):
        deploy(mlp(), torch.randn(4, 6), to=tmp_path / "deep" / "a", formats="onnx")
    assert not list((tmp_path / "deep").iterdir())


def test_what_is_not_installed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    with pytest.raises(
        AccelError,
        match=r"onnx, onnxscript, onnxruntime not installed: pip install 'lightning-accel\[export\]'",
    ):
        deploy(mlp(), torch.randn(4, 6), to=tmp_path / "a", formats="onnx")


def test_a_metric_that_falls_too_far_refuses_a_format(tmp_path: Path, spoil: Spoiled) -> None:
    net, x = mlp(), torch.randn(64, 6)
    with torch.no_grad():
        labels = net(x).argmax(-1)

    def accuracy(predict: Callable[..., Tensor]) -> float:
        return float((predict(x).argmax(-1) == labels).float().mean())

    bundle = deploy(net, x[:4], to=tmp_path / "a", formats="export", metric=accuracy, max_drop=0.0)
    rows = {row["format"]: row for row in bundle.manifest["candidates"]}
    assert rows["eager"]["metric"] == rows["export"]["metric"] == 1.0
    calls = [0]

    def worse(predict: Callable[..., Tensor]) -> float:
        calls[0] += 1
        return accuracy(predict) - 0.02 * (calls[0] - 1)

    with pytest.raises(AccelError, match="the metric falls from 1 to 0.98, by more than 0.01"):
        deploy(net, x[:4], to=tmp_path / "b", formats="export", metric=worse, max_drop=0.01)
    assert not (tmp_path / "b").exists()
    with pytest.raises(ValueError, match="`metric` returns a finite number"):
        deploy(
            net,
            x[:4],
            to=tmp_path / "b",
            formats="export",
            metric=lambda p: float("nan"),
            max_drop=0.1,
        )


def test_examples_to_check_are_compared_as_well(tmp_path: Path, spoil: Spoiled) -> None:
    net, odd = mlp(), torch.full((3, 6), 77.0)
    spoil(
        "export",
        lambda run: lambda t: tuple(1.01 * a if bool((t[0] == 77).all()) else a for a in run(t)),
    )
    assert deploy(net, torch.randn(4, 6), to=tmp_path / "a", formats="export").format == "export"
    with pytest.raises(AccelError, match="number 1 of `check`"):
        deploy(
            net,
            torch.randn(4, 6),
            to=tmp_path / "b",
            formats="export",
            check=[torch.randn(2, 6), odd],
        )


def paced(name: str, gain: float, alone: float | None = None) -> Candidate:
    paces = {}
    for size, found in {"4": gain, "1": gain if alone is None else alone}.items():
        ratio = Ratio(found, found - 0.01, found + 0.01)
        verdict = speed.not_faster(ratio, Ratio(1, 0.99, 1.01), 1.0)
        paces[size] = Pace(1 / found, ratio, verdict)
    return Candidate(name, runner=lambda tensors: (), paces=paces)


def chosen(*made: Candidate, least: float = 1.0) -> tuple[str, bool]:
    return choose({c.name: c for c in made}, "4", least)


def test_the_fastest_is_chosen_and_who_is_slower_than_the_model_never_is() -> None:
    slow, fast, second = paced("export", 0.7), paced("aoti", 2.0), paced("onnx", 1.4)
    assert chosen(slow, fast, second) == ("aoti", True)
    assert chosen(slow, fast, second, least=2.5) == ("onnx", False)
    # Equal at the example's batch and far faster alone, against a little faster and equal.
    assert chosen(paced("aoti", 1.06, 1.0), paced("onnx", 1.0, 2.7)) == ("onnx", True)
    # Slower at the example's batch is slower, whatever it gains elsewhere.
    assert chosen(paced("onnx", 0.9, 3.0)) == ("onnx", False)
    assert chosen(paced("aoti", 4.0, 0.9), paced("onnx", 1.2, 1.2)) == ("aoti", True)
    # The fastest that runs elsewhere, where nothing is faster; no difference is no gain.
    assert chosen(paced("aoti", 0.9), slow, paced("onnx", 0.8)) == ("onnx", False)
    assert chosen(paced("onnx", 1.0)) == ("onnx", False)


def test_the_portable_file_and_those_that_were_named_are_kept() -> None:
    made = {name: paced(name, 2.0) for name in ("export", "aoti", "onnx")}
    assert kept_formats(made, "aoti", ("auto",)) == ["aoti", "onnx"]
    assert kept_formats(made, "aoti", ("auto", "export")) == ["export", "aoti", "onnx"]
    assert kept_formats(made, "export", ("auto",)) == ["export", "onnx"]
    made["onnx"].refuse("wrong")
    assert kept_formats(made, "aoti", ("auto",)) == ["aoti", "export"]
    assert kept_formats({"aoti": made["aoti"]}, "aoti", ("aoti",)) == ["aoti"]


@pytest.mark.filterwarnings("default:no format is faster than the model")
def test_a_bundle_that_is_not_faster_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = itertools.cycle([Ratio(1, 0.99, 1.01), Ratio(0.5, 0.4, 0.6)])
    monkeypatch.setattr(speed.race, "speedup", lambda *_: next(found))
    with pytest.warns(
        UserWarning, match=r"no format is faster.*at batch 4 export is not faster: slower: 0.50x"
    ):
        bundle = deploy(mlp(), torch.randn(4, 6), to=tmp_path / "a", formats="export")
    assert not bundle.faster and bundle.manifest["faster"] is False
    assert "Nothing is faster than the model here" in bundle.table
    monkeypatch.setattr(speed.race, "speedup", lambda a, b: Ratio(2.0, 1.9, 2.1))
    # The model beside itself is then 2x as well: what the clock cannot tell apart is no gain.
    with pytest.warns(UserWarning, match="no measurable difference"):
        assert not deploy(mlp(), torch.randn(4, 6), to=tmp_path / "b", formats="export").faster


# Folders.


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "full")
    for name in ("full", "file", "link"):
        for overwrite in (False, True):
            with pytest.raises(ValueError, match="`to` is taken"):
                deploy(
                    mlp(),
                    torch.randn(4, 6),
                    to=tmp_path / name,
                    formats="export",
                    overwrite=overwrite,
                )
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 3


def test_a_bundle_is_replaced_whole_or_not_at_all(
    tmp_path: Path, spoil: Spoiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()  # an empty folder is free
    deploy(mlp(), torch.randn(4, 6), to=tmp_path / "a", formats="export")
    old = (tmp_path / "a" / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match="overwrite=True"):
        deploy(conv(), torch.randn(4, 3, 5, 5), to=tmp_path / "a", formats="export")

    def fail(self: Path, target: Path) -> None:
        if self.name.endswith(".part"):
            raise OSError("no space")
        real(self, target)

    real = Path.rename
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no space"):
        deploy(conv(), torch.randn(4, 3, 5, 5), to=tmp_path / "a", formats="export", overwrite=True)
    monkeypatch.undo()
    assert (tmp_path / "a" / "manifest.json").read_bytes() == old
    bundle = deploy(
        conv(), torch.randn(4, 3, 5, 5), to=tmp_path / "a", formats="export", overwrite=True
    )
    assert bundle.predict(torch.randn(2, 3, 5, 5)).shape == (2, 5)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_network_that_cannot_be_deployed_leaves_nothing(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    x = torch.ones(4, 6)
    with pytest.raises(Unsupported, match="cannot trace this network"):
        deploy(Branching(), x, to=tmp_path / "a", formats="export")
    with pytest.raises(AccelError, match="the second call answers differently"):
        deploy(Noisy(), x, to=tmp_path / "a", formats="export")
    with pytest.raises(AccelError, match=r"has to run on the example.*RuntimeError"):
        deploy(mlp(), torch.ones(4, 7), to=tmp_path / "a", formats="export")
    with pytest.raises(Unsupported, match="an object of the class set"):
        deploy(Words(lambda a, b: {a, b}), tokens(), to=tmp_path / "a", formats="export")
    assert not list(tmp_path.iterdir())


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "model": ({"model": lambda x: x}, TypeError, "`model` is a module"),
    "no tensors": ({"example": (1, 2)}, TypeError, "`example` holds tensors"),
    "to": ({"to": 3}, TypeError, "`to` is a path"),
    "address": ({"to": "s3://x/y"}, ValueError, "`to` is a path on this machine"),
    "format": ({"formats": "tflite"}, ValueError, "unknown `formats`"),
    "formats": ({"formats": ()}, TypeError, "`formats` is a list"),
    "batch": ({"batch": 0}, ValueError, "`batch` is a whole number"),
    "dynamic": ({"dynamic": "yes"}, TypeError, "`dynamic` is true, false, or sizes"),
    "dynamic name": ({"dynamic": {"y": {0: "n"}}}, ValueError, "'y'; there are 'input'"),
    "dynamic dim": ({"dynamic": {"input": {2: "n"}}}, ValueError, "a name for a dimension"),
    "dynamic word": ({"dynamic": {"input": {1: "a b"}}}, ValueError, "a name for a dimension"),
    "metric": ({"metric": 1, "max_drop": 0.1}, TypeError, "`metric` is a function"),
    "metric alone": ({"metric": lambda p: 1.0}, ValueError, "go together"),
    "drop alone": ({"max_drop": 0.1}, ValueError, "go together"),
    "drop": ({"metric": lambda p: 1.0, "max_drop": -1}, ValueError, "`max_drop`"),
    "speedup": ({"min_speedup": 0}, ValueError, "`min_speedup`"),
    "budget": ({"budget_s": 0}, ValueError, "`budget_s`"),
    "pre": ({"pre": torch.relu}, TypeError, "`pre` is a module"),
    "overwrite": ({"overwrite": 1}, TypeError, "`overwrite` is true or false"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_in_words(tmp_path: Path, name: str) -> None:
    changed, kind, said = BAD[name]
    given: dict[str, Any] = {
        "model": mlp(),
        "example": torch.randn(4, 6),
        "to": tmp_path / "a",
        "formats": "export",
    }
    with pytest.raises(kind, match=said):
        deploy(**{**given, **changed})
    assert not list(tmp_path.iterdir())


# Attacks on what lies on the disk: nothing may be loaded.


def changed_manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def attack(folder: Path) -> None:
        content = json.loads((folder / "manifest.json").read_text())
        change(content)
        (folder / "manifest.json").write_text(json.dumps(content))

    return attack


def flip(folder: Path) -> None:
    data = bytearray((folder / "model.pt2").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.pt2").write_bytes(data)


def link(folder: Path) -> None:
    outside = folder.parent / "outside"
    (folder / "model.onnx").rename(outside)
    (folder / "model.onnx").symlink_to(outside)


def escape(folder: Path, name: str = "../outside") -> None:
    def change(content: dict[str, Any]) -> None:
        content["files"][name] = content["files"].pop("model.onnx")
        content["formats"]["onnx"] = name

    (folder / "model.onnx").rename(folder.parent / "outside")
    changed_manifest(change)(folder)


ATTACKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a flipped bit": (flip, "`model.pt2` is not what it was"),
    "a longer file": (
        lambda d: (d / "README.md").write_text((d / "README.md").read_text() + "x"),
        "`README.md` has another size",
    ),
    "an extra file": (
        lambda d: (d / "x.so").write_text("x"),
        "a file that the manifest does not list.*x.so",
    ),
    "an extra folder": (lambda d: (d / "x").mkdir(), "a file that the manifest does not list"),
    "a missing file": (lambda d: (d / "model.pt2").unlink(), "a file is missing.*model.pt2"),
    "a link": (link, "`model.onnx` has to be a file.*a link"),
    "a folder for a file": (
        lambda d: ((d / "model.onnx").unlink(), (d / "model.onnx").mkdir()),
        "no regular file",
    ),
    "a place above": (escape, r"lists what cannot lie in the folder.*\.\./outside"),
    "an absolute place": (
        lambda d: escape(d, "/etc/passwd"),
        "lists what cannot lie in the folder",
    ),
    "a place within": (lambda d: escape(d, "a/b"), "lists what cannot lie in the folder"),
    "a backslash": (lambda d: escape(d, "..\\outside"), "lists what cannot lie in the folder"),
    "a name of nothing": (lambda d: escape(d, ".."), "lists what cannot lie in the folder"),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "there is no manifest"),
    "a manifest elsewhere": (
        lambda d: (
            (d / "manifest.json").rename(d.parent / "m"),
            (d / "manifest.json").symlink_to(d.parent / "m"),
        ),
        "`manifest.json` has to be a file",
    ),
    "no JSON": (lambda d: (d / "manifest.json").write_text("{"), "the manifest cannot be read"),
    "deep JSON": (
        lambda d: (d / "manifest.json").write_text("[" * 99999),
        "the manifest cannot be read",
    ),
    "bytes": (
        lambda d: (d / "manifest.json").write_bytes(b"\xff\xfe"),
        "the manifest cannot be read",
    ),
    "NaN": (
        lambda d: (d / "manifest.json").write_text('{"schema": NaN}'),
        "the manifest cannot be read",
    ),
    "a list": (lambda d: (d / "manifest.json").write_text("[]"), "the manifest is no object"),
    "another version": (
        changed_manifest(lambda c: c.update(schema=2)),
        "another form than this release reads",
    ),
    "a version that is true": (
        changed_manifest(lambda c: c.update(schema=True)),
        "another form than",
    ),
    "no format": (changed_manifest(lambda c: c.pop("format")), "the manifest is incomplete"),
    "an unknown format": (
        changed_manifest(lambda c: c["formats"].update(sh="model.onnx")),
        "malformed",
    ),
    "a format without a file": (
        changed_manifest(lambda c: c["formats"].update(aoti="x")),
        "malformed",
    ),
    "a hash that is none": (
        changed_manifest(lambda c: c["files"]["model.pt2"].update(sha256="x")),
        "malformed",
    ),
    "a size that is none": (
        changed_manifest(lambda c: c["files"]["model.pt2"].update(size="1")),
        "malformed",
    ),
    "files that are none": (changed_manifest(lambda c: c.update(files=[])), "malformed"),
    "a signature that is none": (
        changed_manifest(lambda c: c.update(signature={})),
        "malformed.*signature",
    ),
    "a tensor that is not there": (
        changed_manifest(lambda c: c["signature"].update(answer={"tensor": 7})),
        "malformed.*signature",
    ),
    "a class without a name": (
        changed_manifest(lambda c: c["signature"].update(answer={"named": [], "class": 3})),
        "malformed.*signature",
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_what_is_damaged_or_forged_is_refused_before_anything_is_loaded(
    written: Bundle, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    shutil.copytree(written.path, tmp_path / "net")
    loaded: list[str] = []
    monkeypatch.setattr(backends, "load", lambda name, *_: loaded.append(name))
    attack, said = ATTACKS[name]
    attack(tmp_path / "net")
    with pytest.raises(BadBundle, match=said):
        load_bundle(tmp_path / "net")
    assert not loaded


def test_a_forged_class_name_makes_no_object_of_it(written: Bundle, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(written.path, tmp_path / "net")
    answer = {"object": [["args", {"tensor": 0}]], "class": "subprocess.Popen"}
    changed_manifest(lambda c: c["signature"].update(answer=answer))(tmp_path / "net")
    found = load_bundle(tmp_path / "net").predict(torch.ones(2, 6))
    assert type(found).__name__ == "SimpleNamespace"


def test_a_folder_that_is_not_there_and_a_format_that_is_not_in_it_are_said(
    written: Bundle, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match="There is no bundle"):
        load_bundle(tmp_path / "none")
    with pytest.raises(ValueError, match="unknown `format`"):
        load_bundle(written.path, format="aoti")
    with pytest.raises(TypeError, match="`path` is a path"):
        load_bundle(3)  # type: ignore[arg-type]


def test_a_file_that_cannot_run_here_gives_way_to_one_that_can(
    written: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = written.manifest["format"]
    other = next(name for name in FORMATS if name != best)
    known = backends.FORMATS[best]
    monkeypatch.setitem(backends.FORMATS, best, known._replace(lacking=lambda: "not installed"))
    with pytest.warns(
        UserWarning, match=f"runs as '{other}', not as '{best}'. Found: {best}: not installed"
    ):
        found = load_bundle(written.path)
    assert found.format == other
    with pytest.raises(AccelError, match="nothing in the bundle"):
        load_bundle(written.path, format=best)


# The callback.


class Lit(LightningModule):
    """Two networks where `extra` is set, and a `forward` of its own unless `steps_alone`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).softmax(-1)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


class StepsAlone(Lit):
    """Without a `forward`: what is called is its network."""

    forward = LightningModule.forward  # type: ignore[assignment]


class Several(Lit):
    """Its step calls two networks."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(6, 3)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]) + self.other(batch[0]), batch[1])


class Stream(IterableDataset[Any]):
    """Data that can be read once."""

    def __init__(self) -> None:
        self.left = [(torch.randn(6), torch.tensor(n % 3)) for n in range(16)]

    def __iter__(self) -> Iterator[Any]:
        while self.left:
            yield self.left.pop()


def fit(
    model: LightningModule, folder: Path, *callbacks: Callback, data: Any = None, **kwargs: Any
) -> Trainer:
    torch.manual_seed(1)
    if data is None:
        data = TensorDataset(torch.randn(16, 6), torch.arange(16) % 3)
        data = DataLoader(data, 8, shuffle=True)
    kwargs = {"max_epochs": 2, "enable_checkpointing": False, **kwargs}
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **kwargs,
    )
    trainer.fit(model, data)
    return trainer


quick = partial(Deploy, formats="export", budget_s=0.02)
each_fit = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"
)


@each_fit
def test_a_fit_with_deployment_is_the_fit_without_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = Lit()
    deployed = copy.deepcopy(plain)
    fit(plain, tmp_path / "plain")
    random = torch.get_rng_state()
    callback = quick()
    trainer = fit(deployed, tmp_path / "with", callback)
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, deployed.state_dict()[name]), name
    assert deployed.training == plain.training and deployed.trainer is trainer
    assert callback.bundle is not None and callback.bundle.path == tmp_path / "with" / "bundle"
    x = torch.randn(5, 6)
    close(callback.bundle.predict(x), plain.eval()(x))  # its forward, softmax and all
    fit(copy.deepcopy(plain), tmp_path / "with", quick(), max_epochs=1)
    assert {p.name for p in (tmp_path / "with").iterdir()} == {"bundle", "bundle-1"}


@each_fit
def test_without_a_forward_the_network_that_a_step_calls_is_deployed(tmp_path: Path) -> None:
    model, callback = StepsAlone(), quick(tmp_path / "net")
    fit(model, tmp_path, callback)
    assert callback.bundle is not None and callback.bundle.path == tmp_path / "net"
    x = torch.randn(5, 6)
    close(callback.bundle.predict(x), model.net.eval()(x))


@each_fit
def test_an_example_array_of_the_module_is_used(tmp_path: Path) -> None:
    model, callback = Lit(), quick()
    model.example_input_array = torch.randn(3, 6)
    fit(model, tmp_path, callback)
    assert callback.bundle is not None
    assert "3" in callback.bundle.manifest["candidates"][0]["paces"]


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 4


@each_fit
def test_what_is_put_around_the_network_becomes_part_of_its_files(tmp_path: Path) -> None:
    model, callback = StepsAlone(), quick(pre=Scaled(), post=nn.Softmax(-1))
    fit(model, tmp_path, callback)
    assert callback.bundle is not None
    x = torch.randn(5, 6)
    close(callback.bundle.predict(x), model.net.eval()(x / 4).softmax(-1))


class Scored(StepsAlone):
    """Whose first epoch is its best by what it says."""

    def on_train_epoch_end(self) -> None:
        self.log("score", float(-self.current_epoch))


@each_fit
@pytest.mark.slow
@pytest.mark.parametrize("others", [[], ["prune"], ["prune", "quantize"]], ids=len)
def test_the_best_weights_are_those_of_the_best_checkpoint(
    tmp_path: Path, others: list[str]
) -> None:
    made: list[Callback] = []
    if "prune" in others:  # best scores start anew there
        made.append(lightning_accel.StructuredPruning(ratio=0.5, when=1))
    if "quantize" in others:
        made.append(lightning_accel.QuantizationAwareTraining())
    best = ModelCheckpoint(tmp_path / "files", monitor="score", mode="max", save_top_k=-1)
    model, callback = Scored(), quick(weights="best")
    fit(model, tmp_path, callback, best, *made, max_epochs=4, enable_checkpointing=True)
    saved = lightning_accel.load_from_checkpoint(Scored, best.best_model_path).eval()
    assert callback.bundle is not None and saved.net is not model.net
    x = torch.randn(5, 6)
    close(callback.bundle.predict(x), saved.net(x))
    assert not torch.allclose(saved.net(x), model.eval().net(x), atol=1e-3)


@each_fit
def test_without_a_best_checkpoint_nothing_is_deployed_as_the_best(tmp_path: Path) -> None:
    callback = quick(weights="best")
    with pytest.warns(UserWarning, match="no best checkpoint"):
        fit(StepsAlone(), tmp_path, callback)
    assert callback.bundle is None


@each_fit
def test_a_stream_loses_no_batch_to_the_deployment(tmp_path: Path) -> None:
    model, callback = StepsAlone(), quick()
    trainer = fit(model, tmp_path, callback, data=DataLoader(Stream(), 4), max_epochs=1)
    assert trainer.global_step == 4 and callback.bundle is not None


@each_fit
def test_a_deployment_that_fails_leaves_the_training_and_says_why(tmp_path: Path) -> None:
    callback = quick()
    with pytest.warns(UserWarning, match=r"was not deployed.*calls net, other.*`forward`"):
        trainer = fit(SeveralAlone(), tmp_path, callback)
    assert trainer.state.finished and callback.bundle is None and not list(tmp_path.iterdir())


class SeveralAlone(Several):
    """Two networks, and no `forward` that says which is meant."""

    forward = LightningModule.forward  # type: ignore[assignment]


@each_fit
def test_a_place_that_is_taken_stops_a_fit_before_it_begins(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("x")
    model = Lit()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="`to` is taken"):
        fit(model, tmp_path, quick(tmp_path / "mine"))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@each_fit
@pytest.mark.filterwarnings("ignore:`max_epochs` was not set")
def test_a_trial_run_writes_nothing(tmp_path: Path) -> None:
    callback = quick()
    fit(Lit(), tmp_path, callback, fast_dev_run=True)
    assert callback.bundle is None and not list(tmp_path.iterdir())


def test_a_callback_travels_without_what_is_open(tmp_path: Path) -> None:
    callback = quick(tmp_path)
    callback.bundle = "open"  # type: ignore[assignment]
    assert copy.copy(callback).bundle is None and copy.copy(callback).to == tmp_path


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        ({"to": 3}, TypeError, "`to` is a path"),
        ({"formats": "tflite"}, ValueError, "unknown `formats`"),
        ({"weights": "averaged"}, ValueError, "`weights`"),
        ({"pre": len}, TypeError, "`pre` is a module"),
        ({"budget_s": 0}, ValueError, "`budget_s`"),
        ({"overwrite": "yes"}, TypeError, "`overwrite`"),
        ({"batch": 0}, ValueError, "`batch`"),
        ({"dynamic": 3}, TypeError, "`dynamic`"),
        ({"min_speedup": -1}, ValueError, "`min_speedup`"),
    ],
)
def test_bad_arguments_of_the_callback_are_refused_at_once(
    given: dict[str, Any], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        Deploy(**given)


# The command line.


def test_the_command_writes_a_bundle_and_one_json_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "made_for_export.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def net(): return nn.Linear(6, 3)\n"
        "def pair(): return nn.Linear(6, 3), torch.ones(2, 6)\n"
        "from lightning.pytorch.demos.boring_classes import BoringModel\n"
        "def lit(): return BoringModel(), BoringModel().train_dataloader()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    words = ["--formats", "export", "--budget-s", "0.02"]
    assert main(["export", "made_for_export:net", "--example", "4,6", "--to", "a", *words]) == 0
    said = capsys.readouterr()
    assert "export" in said.out and f"Wrote {tmp_path / 'a'}" in said.out
    assert load_bundle("a").predict(torch.ones(7, 6)).shape == (7, 3)
    assert main(["export", "made_for_export:pair", "--to", "b", "--static", "--json", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["path"] == str(tmp_path / "b")
    assert found["signature"]["inputs"][0]["shape"] == [2, 6]
    assert main(["export", "made_for_export:net", "--to", "c", *words]) == 2
    assert "needs an example" in capsys.readouterr().err
    assert main(["export", "made_for_export:pair", "--to", "b", *words]) == 2
    assert "`to` is taken" in capsys.readouterr().err
    assert main(["export", "made_for_export:pair", "--to", "d", "--quantize", "int8", *words]) == 2
    assert "a network without data" in capsys.readouterr().err
    assert main(["export", "made_for_export:lit", "--to", "e", "--quantize", "int8", *words]) == 0
    assert any("quantized to" in note for note in load_bundle("e").manifest["notes"])


def test_nothing_is_said_by_exporters(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    deploy(mlp(), torch.randn(4, 6), to=tmp_path / "a", formats=FORMATS)
    said = capfd.readouterr()
    assert said.out == "" and said.err == "" and not caplog.records


def test_the_verb_is_public() -> None:
    assert lightning_accel.load_bundle is load_bundle
    assert place.free(Path("nowhere"), False).is_absolute()


@pytest.mark.parametrize("shape", [(4, 1), (4,), (1, 1)])
def test_inputs_and_answers_of_one_number_each(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """A tensor of one number counts as contiguous whatever its stride is, and then has no bytes to look at."""

    class Column(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * 2, x.reshape(x.shape[0], -1)[:, 0]

    bundle = deploy(Column(), torch.randn(shape), to=tmp_path / "net", formats=["export", "onnx"])
    x = torch.randn(3, *shape[1:])
    close(bundle.predict(x)[0], x * 2)


def test_a_network_whose_weights_are_no_numbers_is_refused(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        net[0].weight[1, 2] = float("nan")
    with pytest.raises(AccelError, match=r"answers are no numbers.*Do: look at its weights"):
        deploy(net, torch.randn(8, 4), to=tmp_path / "net", formats="export")
    assert not (tmp_path / "net").exists()
