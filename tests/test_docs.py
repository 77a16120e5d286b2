"""README and docs tell the truth: blocks run, presets compose, commands parse, and what is named exists."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import torch
from hydra import compose, initialize_config_dir
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_accel
from lightning_accel import AccelReport, BlockCompile
from lightning_accel._hydra_plugins import LightningAccelSearchPath, register
from lightning_accel.attach import requested
from lightning_accel.cli.main import _parser
from lightning_accel.distillation import losses

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WRITTEN = [page for page in PAGES if page.name != "files.md"]
STORY = "first_ten_minutes.md"
"""Its blocks are one program."""
MOST_NOT_RUN = 4


class Block(NamedTuple):
    page: str
    line: int
    words: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def _blocks() -> Iterator[Block]:
    for page in WRITTEN:
        text = page.read_text()
        for found in re.finditer(r"^```([^\n]*)\n(.*?)^```", text, re.S | re.M):
            line = text[: found.start()].count("\n") + 1
            yield Block(page.name, line, found[1].strip(), found[2])


BLOCKS = list(_blocks())
PYTHON = [block for block in BLOCKS if block.words.split(" ")[0] == "python"]
RUN = [block for block in PYTHON if block.words == "python"]
NOT_RUN = [block for block in PYTHON if block.words == "python no-run"]
SHELL = [block for block in BLOCKS if block.words == "sh"]
PROSE = {p.name: re.sub(r"^```.*?^```", "", p.read_text(), flags=re.S | re.M) for p in WRITTEN}
IN_HYDRA, IN_CLI = (b.text for b in BLOCKS if b.page == "configuration.md" and b.words == "yaml")


VARIABLES: list[str] = []


def _commands() -> Iterator[tuple[str, list[str]]]:
    for block in SHELL:
        for line in block.text.splitlines():
            words = shlex.split(line, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                if words[0].startswith("LIGHTNING_ACCEL="):
                    VARIABLES.append(words[0].partition("=")[2])
                words = words[1:]
            if words:
                yield f"{block.page}: {line}", words


COMMANDS = list(_commands())
OVERRIDES = sorted(
    {
        (words[1], *(word for word in words[2:] if word != "-m" and "tuned.yaml" not in word))
        for _, words in COMMANDS
        if words[0] == "python"
        and words[1].endswith("/train.py") | (words[1] == "train.py")
        # Hydra's sweepers resolve these, of which Optuna's is not installed here; tests/test_sweep_page.py has a sweep.
        and not any("glob(" in word or "interval(" in word for word in words)
    }
)


class MyModule(LightningModule):
    """The user's own, of which the pages only speak."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny.ConvNet()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


class MyData(LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.randn(64, 3, 8, 8), torch.randint(4, (64,))), 32)


def users(folder: Path) -> dict[str, Any]:
    """What a reader's program has before a block begins; a block imports the rest itself."""
    module, net = MyModule(), tiny.ConvNet()
    rows = TensorDataset(torch.randn(64, 3, 8, 8), torch.randint(4, (64,)))
    trainer = Trainer(logger=False, max_epochs=1, enable_progress_bar=False, accelerator="cpu")
    trainer.fit(module, DataLoader(rows, 32))
    trainer.save_checkpoint(folder / "last.ckpt")
    return {
        "MyModule": MyModule,
        "MyData": MyData,
        "model": MyModule(),
        "data": DataLoader(rows, 32),
        "net": net,
        "optimizer": torch.optim.Adam(net.parameters()),
        "teacher": tiny.ConvNet(),
    }


quiet = pytest.mark.filterwarnings(
    "ignore:Starting from v1.9.0, `tensorboardX`",
    "ignore:the teacher is hardly better than guessing",
    "ignore:WarmStart had no effect",
    "ignore:StructuredPruning prunes before epoch",
    "ignore:`weights_only` was not set",
    "ignore:Precision bf16-mixed is not supported by the model summary",
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",
    "ignore:.*slower",
)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, and defaults that take no seconds."""
    monkeypatch.chdir(tmp_path)
    for cls, name, value in (
        (AccelReport, "budget_s", 0.2),
        (BlockCompile, "backend", "eager"),
    ):
        monkeypatch.setitem(cls.__init__.__kwdefaults__, name, value)  # type: ignore[misc]
    return tmp_path


@quiet
@pytest.mark.slow
@pytest.mark.usefixtures("clean_dynamo")
@pytest.mark.parametrize("block", [b for b in RUN if b.page != STORY], ids=str)
def test_every_block_runs_as_it_stands(
    block: Block, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "LightningCLI" in block.text:
        run_in_cli(monkeypatch, small)
    namespace = users(small)
    if "cfg" in block.text:  # a program that has one asks its Trainers for what it says
        namespace["cfg"] = OmegaConf.create(
            {
                "trainer": {"_target_": "lightning.pytorch.Trainer", "logger": False},
                "callbacks": {"meter": {"_target_": "lightning_accel.StepMeter"}},
            }
        )
    run(block, namespace)
    if "LightningCLI" in block.text:
        trainer, module = namespace["cli"].trainer, namespace["cli"].model
        assert {"StructuredPruning", "StepMeter"} <= {type(c).__name__ for c in trainer.callbacks}
        sizes = [sum(p.numel() for p in m.parameters()) for m in (module, MyModule())]
        assert sizes[0] < sizes[1]


@quiet
@pytest.mark.slow
def test_the_first_ten_minutes_run_as_one_program(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")

    namespace: dict[str, Any] = {}
    for block in (b for b in RUN if b.page == STORY):
        text = block.text
        for long, short in SHORTER.items():
            text = text.replace(long, short)
        run(block._replace(text=text), namespace)


SHORTER = {
    "budget_s=10": "budget_s=1",
    "max_epochs=60": "max_epochs=1",
    "max_epochs=8": "max_epochs=1",
    "[:1500]": "[:128]",
    "[1500:]": "[1500:1564]",
}
"""What the test of the story takes instead, so that it takes seconds."""


def run(block: Block, namespace: dict[str, Any]) -> None:
    """Run a block where its errors name the page and the line."""
    code = "\n" * block.line + block.text
    exec(compile(code, block.page, "exec"), namespace)  # noqa: S102 - our own text


def run_in_cli(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Give the block what the command and the yaml beside it say."""
    pytest.importorskip("jsonargparse")
    (folder / "config.yaml").write_text(IN_CLI)
    ((_, words),) = [c for c in COMMANDS if c[1][:2] == ["python", "main.py"]]
    more = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--seed_everything=0"]
    more += ["--trainer.enable_model_summary=false", "--trainer.default_root_dir=logs"]
    monkeypatch.setattr(sys, "argv", ["main.py", *words[2:], *more])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # as it was, afterwards
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


@pytest.mark.parametrize("block", NOT_RUN, ids=str)
def test_a_block_that_is_not_run_compiles_and_its_imports_are_there(block: Block) -> None:
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)


def test_few_blocks_are_not_run_and_none_has_another_mark() -> None:
    assert len(NOT_RUN) <= MOST_NOT_RUN
    assert len(RUN) + len(NOT_RUN) == len(PYTHON)
    assert {b.words.split(" ")[0] for b in BLOCKS} <= {"python", "sh", "yaml", ""}


@pytest.fixture
def hydra_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin of this checkout, and no other."""
    register()
    plugins = Plugins.instance().plugin_type_to_subclass_list
    others = [p for p in plugins[SearchPathPlugin] if p.__name__ != "LightningAccelSearchPath"]
    monkeypatch.setitem(plugins, SearchPathPlugin, [*others, LightningAccelSearchPath])


@pytest.fixture
def app(tmp_path: Path, hydra_here: None) -> Path:
    """A Hydra app of a reader's own, which says what the page has it say."""
    own = IN_HYDRA + "  accelerator: cpu\n  max_epochs: 3\n  logger: false\n"
    own += "  enable_progress_bar: false\n  enable_checkpointing: false\n"
    own += "  enable_model_summary: false\n"
    own += "callbacks: {early: {_target_: lightning.pytorch.callbacks.LambdaCallback}}\n"
    (tmp_path / "train.yaml").write_text(own)
    return tmp_path


def each_job(words: list[str]) -> Iterator[list[str]]:
    """Take a sweep apart: `a=1,2` is two jobs; a list in brackets is one value."""
    choices = [re.split(r",(?![^\[]*\])", word.partition("=")[2]) for word in words]
    for at in range(max(map(len, choices), default=1)):
        pairs = zip(words, choices, strict=True)
        yield [w if len(c) < 2 else f"{w.partition('=')[0]}={c[at % len(c)]}" for w, c in pairs]


@pytest.mark.slow
@pytest.mark.parametrize("words", OVERRIDES, ids=" ".join)
def test_every_command_that_trains_composes(words: tuple[str, ...], app: Path) -> None:
    script, *rest = words
    assert script == "train.py" or (ROOT / script).is_file()
    folder, name = (app, "train") if script == "train.py" else (ROOT / "conf", "config")
    for job in each_job(rest):
        with initialize_config_dir(version_base="1.3", config_dir=str(folder)):
            cfg = compose(name, job)
        assert cfg.get("accel") or not any(
            word.lstrip("+").startswith(("accel=", "accel/")) for word in job
        )


@quiet
@pytest.mark.slow
@pytest.mark.parametrize("in_yaml", [True, False], ids=["in yaml", "in Python"])
@pytest.mark.parametrize(
    "words",
    [w[1:] for w in OVERRIDES if w[0] == "train.py" and "prune" in w[1]],
    ids=" ".join,
)
def test_every_command_for_an_own_app_does_what_it_says(
    app: Path, words: tuple[str, ...], in_yaml: bool, small: Path
) -> None:
    with initialize_config_dir(version_base="1.3", config_dir=str(app)):
        cfg = compose("train", list(words))
    (block,) = [b.text for b in RUN if b.text.startswith("import hydra")]
    if in_yaml:
        block = "import hydra\ntrainer = hydra.utils.instantiate(cfg.trainer)"
    namespace: dict[str, Any] = {"cfg": cfg}
    exec(compile(block, "configuration.md", "exec"), namespace)  # noqa: S102 - our own text
    trainer, module = namespace["trainer"], MyModule()
    dense = sum(p.numel() for p in module.parameters())
    trainer.fit(module, MyData())
    assert sum(p.numel() for p in module.parameters()) < dense
    names = {type(callback).__name__ for callback in trainer.callbacks}
    assert {"LambdaCallback", "UsePrecision"} <= names
    assert ("AccelReport" in names) == ("~callbacks.report" not in words)
    assert cfg.callbacks.pruning.importance == (
        "taylor" if "accel/pruning=taylor" in words else "magnitude"
    )


@pytest.mark.parametrize(("line", "words"), COMMANDS, ids=[line for line, _ in COMMANDS])
def test_every_command_is_one_that_there_is(line: str, words: list[str]) -> None:
    if words[0] == "lightning-accel":
        assert "run" in _parser().parse_args(words[1:])
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), words
    elif words[:2] == ["pip", "install"]:
        extras = set(re.findall(r"\[(\w+)\]", line))
        assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras)
    elif words[0] == "openssl":
        assert words[1] in ("genpkey", "pkey")
    elif words[0] == "wandb":
        assert words[1] == "agent" or (ROOT / words[2]).is_file()
    else:
        assert words[0] == "python" and (
            words[1] in ("train.py", "main.py", "their_train.py") or (ROOT / words[1]).is_file()
        ), line


@pytest.mark.parametrize("words", VARIABLES)
def test_what_the_variable_asks_for_can_be_had(words: str) -> None:
    assert requested(words.split())


def _named_presets() -> Iterator[tuple[str, str]]:
    for page in WRITTEN:
        for group, value in re.findall(
            r"\+?(accel(?:/\w+)?)=(\[[^\]]*\]|[\w,./]+)", page.read_text()
        ):
            for name in re.split(r"[\[\],]+", value):
                if name and not name.startswith(".") and name not in ("true", "glob"):
                    yield page.name, f"{group}/{name.rstrip('.')}"


@pytest.mark.parametrize(("page", "preset"), sorted(set(_named_presets())))
def test_every_preset_that_is_named_exists(page: str, preset: str) -> None:
    assert (ROOT / "conf" / f"{preset}.yaml").is_file(), f"{page} names {preset}"


def test_every_preset_that_exists_is_named() -> None:
    named = {preset for _, preset in _named_presets()}
    there = {
        p.relative_to(ROOT / "conf").with_suffix("").as_posix()
        for p in (ROOT / "conf" / "accel").rglob("*.yaml")
        if p.stem != "none" or p.parent.name == "accel"
    }
    assert there <= named, f"no page names {sorted(there - named)}"


FOREIGN = (
    "builtins",
    "hydra.utils",
    "lightning.pytorch",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.cli",
    "lightning.pytorch.loggers",
    "lightning.pytorch.strategies",
    "torch",
    "torch.nn",
    "torch.nn.functional",
    "torch.optim.lr_scheduler",
    "torch.utils.data",
    "torch_pruning.pruner",
)
THEIRS = {
    "ModelParallel",
    "DeepSpeed",
    "accel_NAME",
    "customized_pruners",
    "save_weights_only",
    "ignore_index",
}
"""What pages call by a name that is no class: strategies, patterns, arguments of others."""


@cache
def _names() -> frozenset[str]:
    """All classes, functions, methods and arguments of this project, and what others show."""
    found: set[str] = set(THEIRS)
    for top in ("lightning_accel", "examples", "benchmarks"):
        for path in (ROOT / top).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                    found.add(node.name)
                elif isinstance(node, ast.arg):
                    found.add(node.arg)
                elif isinstance(node, ast.Attribute):
                    found.add(node.attr)
                elif isinstance(node, ast.Name):
                    found.add(node.id)
                elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    found.add(node.target.id)
    for module in FOREIGN:
        found |= set(dir(importlib.import_module(module)))
    found |= (
        set(dir(LightningModule)) | set(dir(Trainer)) | set(dir(torch.utils)) | {"flop_counter"}
    )
    return frozenset(found | set(losses.__dict__))


def _quoted() -> Iterator[tuple[str, str]]:
    for page, text in PROSE.items():
        for quoted in re.findall(r"`([^`\n]+)`", text):
            yield page, quoted


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted(PROSE))
def test_every_name_in_backticks_exists(page: str) -> None:
    wrong = [quoted for at, quoted in _quoted() if at == page and not _exists(quoted)]
    assert not wrong, f"{page} names what is not there: {wrong}"


def _exists(quoted: str) -> bool:
    """Whether a name, a call with keywords or a path is one; other texts are not judged."""
    if re.fullmatch(r"[\w.]*\w", quoted):  # a name, or a file without folder
        if re.search(r"\.(py|md|yaml|json|svg|zip)$", quoted):
            return quoted in _examples_of_files() or any(ROOT.glob(f"**/{quoted}"))
        parts = quoted.strip(".").split(".")
        return all(part in _names() or part in _words() for part in parts)
    if called := re.fullmatch(r"(\w+)\((.*)\)", quoted, re.S):
        return called[1] in _names() and _takes(called[1], called[2])
    if re.fullmatch(r"[\w./-]+/[\w./-]*", quoted):
        return any(
            (base / quoted).exists() for base in (ROOT, ROOT / "lightning_accel", ROOT / "conf")
        ) or (quoted.split("/")[0] in LOGGED)
    return True


LOGGED = {"report", "measure", "val", "test", "pruning", "distillation", ".hydra"}
"""Prefixes of logged values, which look like paths."""


def _takes(name: str, text: str) -> bool:
    """Whether a public name has the keywords that a call in the text gives it."""
    if name not in lightning_accel.__all__:
        return True
    taken = inspect.signature(getattr(lightning_accel, name)).parameters
    keywords = set(re.findall(r"(\w+)=", text))
    open_ended = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    return open_ended or keywords <= set(taken)


@cache
def _words() -> frozenset[str]:
    """Keys and values of our configuration, dependencies, options and values in strings of the package."""
    text = "".join(p.read_text() for p in (ROOT / "conf").rglob("*.yaml"))
    text += (ROOT / "pyproject.toml").read_text()
    for path in (ROOT / "lightning_accel").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and len(node.value) < 40
            ):
                text += f" {node.value} "
    return frozenset(re.findall(r"\w+", text)) | REFUSED | {"q", "k"}


REFUSED = {"utils", "helpers", "common", "base", "misc", "manager"}
"""Named by the architecture as what there is not."""


@cache
def _examples_of_files() -> frozenset[str]:
    """Files that blocks write or read."""
    return frozenset(re.findall(r"[\w.]+\.\w+", " ".join(b.text for b in BLOCKS))) | {
        "report.md",
        "strategy.py",
    }


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    local = [link.partition("#")[0] for link in links if "://" not in link]
    assert all((page.parent / link).exists() for link in local), local


def test_the_readme_is_short_and_no_page_is_long() -> None:
    assert len((ROOT / "README.md").read_bytes()) < 10_000
    for page in WRITTEN:
        lines = page.read_text().count("\n")
        assert lines <= (
            120
            if page.name not in ("README.md", STORY, "architecture.md", "configuration.md")
            else 220
        ), page.name


def test_every_technique_has_a_page_that_the_readme_links() -> None:
    folders = [p.name for p in (ROOT / "conf" / "accel").iterdir() if p.is_dir()]
    folders += ["memory_format", "measuring"]
    readme = (ROOT / "README.md").read_text()
    for name in folders:
        assert (ROOT / "docs" / f"{name}.md").is_file(), f"docs/{name}.md is missing"
    for page in PAGES[1:]:
        assert f"(docs/{page.name})" in readme, f"the README does not link {page.name}"


def test_every_public_name_is_on_a_page() -> None:
    text = "".join(PROSE.values()) + "".join(b.text for b in BLOCKS)
    missing = [n for n in lightning_accel.__all__ if not re.search(rf"\b{n}\b", text)]
    assert not missing, f"no page names {missing}"


def test_public_names_are_the_classes_that_they_say() -> None:
    for name in lightning_accel.__all__:
        assert getattr(lightning_accel, name).__name__ == name


@pytest.mark.slow
def test_a_user_does_not_see_how_lightning_asks_torch_and_sees_all_else() -> None:
    script = """
import warnings, lightning_accel
warnings.warn("`isinstance(treespec, LeafSpec)` is deprecated, use another", FutureWarning)
warnings.warn("something else is deprecated", FutureWarning)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert "something else" in done.stderr and "LeafSpec" not in done.stderr
