"""Pages tell what report.json says, whatever else lies in the folder, and run nothing that stands in it."""

from __future__ import annotations

import json
import math
import random
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import reports
from browser import CHROMIUM, Browser

from lightning_accel.cli import main
from lightning_accel.errors import AccelError
from lightning_accel.measure.progress import Progress, thinned
from lightning_accel.measure.table import show
from lightning_accel.pages import Drawing, Run, find_runs, pareto_front, plots, read_run, render
from lightning_accel.pages.compare import compare
from lightning_accel.pages.drawing import Scale
from lightning_accel.pages.page import drawings, is_free, write_page
from lightning_accel.pages.runs import gather
from lightning_accel.pages.views import view

EVIL = "val/<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


class Seen(HTMLParser):
    """What a reader sees of a page, and what a browser would run or fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self._stack: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "br", "link", "img"):
            self._stack.append(tag)
        given = dict(attrs)
        self.links += [str(given[k]) for k in ("href", "src", "xlink:href") if k in given]
        self.ids += [str(given["id"])] if "id" in given else []
        assert not [name for name in given if name.startswith("on")], "a handler in a page"

    def handle_endtag(self, tag: str) -> None:
        assert self._stack.pop() == tag, f"{tag} is out of place"

    def handle_data(self, data: str) -> None:
        if self._stack and self._stack[-1] not in ("script", "style"):
            self.words.append(data)


# --- one run ----------------------------------------------------------------------------------------


def test_a_page_says_what_the_report_says(tmp_path: Path) -> None:
    found = reports.report()
    folder = reports.written(tmp_path / "a run", found, ["+accel=amp_prune"])
    seen = Seen(render([read_run(folder)]))
    for side in ("dense", "final"):
        for value in (
            found[side]["params"],
            found[side]["macs"],
            *found[side]["latency_ms"].values(),
        ):
            assert show(value) in seen.text
        assert all(show(value) in seen.text for value in found[side]["metrics"].values())
    assert "4.00x" in seen.text and "1.70x" in seen.text
    assert "0.80x" in seen.text and "slower" in seen.text, "a loss is told"
    cards = {card.label: (card.value, card.tone) for card in view(read_run(folder), "").cards}
    assert (
        cards["latency, batch 1"] == ("0.80x", "worse") and cards["MACs per sample"][0] == "4.00x"
    )
    assert cards["training steps/s"] == ("withheld", "soft"), (
        "a gain that was not told is not shown"
    )
    assert "withheld" in seen.text
    first, second = (seen.text.index(name) for name in ("AutocastPrecision", "StructuredPruning"))
    assert first < second and "epoch 2" in seen.text and "ratio 0.5, when 2" in seen.text
    for entry in found["timeline"]:
        lines = [*entry.get("did", ()), *entry.get("left_alone", ()), *entry.get("notes", ())]
        assert all(line in seen.text for line in lines)
    assert all(note in seen.text for note in found["notes"])
    assert all(row["layer"] in seen.text for row in found["widths"])
    assert "64 → 32" in seen.text and "+accel=amp_prune" in seen.text
    for told in ("AMD EPYC", "bf16-mixed", "2.13.0", "2.6.6", "0:01:40", "96 KiB", "1 GiB"):
        assert told in seen.text


def test_a_page_is_one_file_that_fetches_and_runs_nothing_of_the_users(tmp_path: Path) -> None:
    found = reports.report()
    found["history"][EVIL] = found["history"].pop("val/acc")
    found["final"]["metrics"][EVIL] = 0.5
    found["widths"][0]["layer"] = found["timeline"][1]["did"][0] = EVIL
    found["notes"] = found["hardware"]["fast_dtypes"] = [EVIL]
    found["hardware"]["name"] = found["precision"] = found["finished"] = EVIL
    runs = [
        read_run(reports.written(tmp_path / name, found, [f"+x={EVIL}", name]))
        for name in ("<b>", "&amp;")
    ]
    for text in (render(runs[:1]), render(runs, title=EVIL)):
        seen = Seen(text)
        assert seen.tags.count("script") == 1 and not {"img", "link", "iframe"} & set(seen.tags)
        assert all(link.startswith("#run-") for link in seen.links)
        assert EVIL in "".join(seen.words), "and it is shown as it is"
        assert "url(" not in text and "@import" not in text
    for drawing in drawings(runs).values():
        ElementTree.fromstring(drawing.to_svg())


def test_a_chart_shows_the_points_of_the_history_to_scale(tmp_path: Path) -> None:
    points = [[1, 0.0], [2, 1.0], [3, None], [4, 0.5], [5, 0.25]]
    folder = reports.written(tmp_path, {**reports.report(), "history": {"val/f1": points}})
    (drawing,) = [d for n, d in drawings([read_run(folder)]).items() if "history" in n]
    curves = [m for m in drawing.marks if type(m).__name__ == "Line" and m.role == "series-0"]
    assert [len(curve.points) for curve in curves] == [2, 2], "what is no number is a gap"
    (x1, y1), (x2, y2) = curves[0].points
    (x4, y4), (x5, y5) = curves[1].points
    assert x2 - x1 == pytest.approx((x4 - x1) / 3) and x5 - x4 == pytest.approx(x2 - x1)
    assert y1 - y4 == pytest.approx((y1 - y2) / 2) and y1 - y5 == pytest.approx((y1 - y2) / 4)
    (edit,) = [m for m in drawing.marks if getattr(m, "role", "") == "edit"]
    assert edit.points[0][0] == pytest.approx(x2)


ODD: dict[str, Any] = {
    "empty": {"dense": {}, "final": {}, "ratios": {}},
    "half": json.dumps(reports.report())[:3000],
    "nothing": "",
    "a list": "[1, 2]",
    "deep": "[" * 100_000,
    "another's": '{"hello": 1}',
    "not finite": '{"dense": {"params": NaN}, "final": {"params": Infinity, "metrics": {"a": -Infinity}}}',
    "huge": {**reports.report(), "history": {"a": [[1, 1e308], [2, -1e308], [10**400, 3]]}},
    "old": {k: v for k, v in reports.report().items() if k in ("dense", "final", "ratios", "edits")},
    "wrong": dict.fromkeys(reports.report(), 3) | {"dense": {"metrics": [1]}, "final": 3},
    "texts": dict.fromkeys(reports.report(), "x"),
    "lists": {key: [None, 3, "x", {}] for key in reports.report()},
    "objects": {key: {"x": {"y": None}, "latency_1": 3} for key in reports.report()},
    "zeros": {
        **reports.report(),
        "ratios": {"params": 0.0, "macs": -1.0, "latency": {"1": 0}},
        "widths": [{"layer": "", "before": 0, "after": 0}],
        "spread": {"latency_1": {"dense": {"p10_ms": 0.0, "median_ms": 0.0}, "ratio_low": 0.0, "ratio_high": 0.0}},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_whatever_stands_in_a_report_there_is_a_page_of_it(tmp_path: Path, name: str) -> None:
    odd = reports.written(tmp_path / "odd", ODD[name])
    for found in (
        [read_run(odd)],
        [read_run(odd), read_run(reports.written(tmp_path / "b", reports.report()))],
    ):
        seen = Seen(render(found))
        assert "nan" not in seen.text.lower().split() and "odd" in seen.text
    if isinstance(ODD[name], str) and name != "not finite":
        assert (
            read_run(odd).problems
            and read_run(odd).problems[0] in Seen(render([read_run(odd)])).text
        )


@pytest.mark.parametrize("name", ["wrong", "texts", "lists"])
def test_files_beside_a_report_may_be_anything(tmp_path: Path, name: str) -> None:
    value = {"wrong": 3, "texts": "x", "lists": [None, 3, {}]}[name]
    run = reports.written(tmp_path, reports.report())
    (run / "tuned.json").write_text(json.dumps({"bars": value, "trials": value, "notes": value}))
    (run / "plan.json").write_text(
        json.dumps({"groups": value, "change_of": value, "share": value})
    )
    (run / "bundle").mkdir()
    manifest = {"candidates": value, "formats": value, "notes": value}
    (run / "bundle" / "manifest.json").write_text(json.dumps(manifest))
    (run / ".hydra").mkdir()
    (run / ".hydra" / "overrides.yaml").write_text(": {")
    (run / "report.progress.json").write_text(
        json.dumps({"lightning_accel_progress": 1, "history": value})
    )
    Seen(render([read_run(run)]))


def test_a_fit_that_died_is_not_shown_with_the_numbers_of_one_before(tmp_path: Path) -> None:
    side = {"params": 98_765_432, "metrics": {"val/acc": 0.5}}
    report = {"dense": side, "final": side, "ratios": {}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert "98,765,432" in render([read_run(tmp_path)])
    (tmp_path / "report.progress.json").write_text(json.dumps({"lightning_accel_progress": 1}))
    run = read_run(tmp_path)
    assert not run.numbers() and "98,765,432" not in render([run])
    assert any("earlier fit" in problem for problem in run.problems)


def test_thousands_of_epochs_are_thinned_and_their_extremes_stay() -> None:
    chance = random.Random(0)
    points = [[i, chance.random()] for i in range(20_000)]
    points[777][1], points[12_345][1] = 5.0, -5.0
    few = thinned(points, 500)
    assert 300 < len(few) <= 502 and few == sorted(few)
    assert points[777] in few and points[12_345] in few and few[0] == points[0]
    assert few[-1] == points[-1] and all(point in points for point in few)
    assert (
        len(render([Run(Path("a"), name="a", report={"dense": {}, "history": {"x": points}})]))
        < 99_000
    )


@pytest.mark.parametrize(("low", "high", "is_log"), [(0, 1, False), (-3, 7e6, False), (0.02, 90, True), (5, 5, False), (1e-9, 1e9, True)])  # fmt: skip
def test_ticks_are_round_and_within(low: float, high: float, is_log: bool) -> None:
    scale = Scale(low, high, 0, 100, is_log=is_log)
    ticks = scale.ticks(5)
    assert 2 <= len(ticks) <= 9
    for value in ticks:
        assert -1e-6 <= scale(value) <= 100 + 1e-6
        assert float(f"{value:.2g}") == pytest.approx(value)


# --- several runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("lower", list(product([True, False], repeat=2)))
def test_the_front_is_what_brute_force_finds(lower: tuple[bool, bool]) -> None:
    chance = random.Random(1)

    def is_beaten(one: tuple[float, float], other: tuple[float, float]) -> bool:
        gains = [(a - b) * (1 if low else -1) for a, b, low in zip(one, other, lower, strict=True)]
        return min(gains) >= 0 and max(gains) > 0

    for _ in range(300):
        size = chance.randrange(0, 9)
        points = [(float(chance.randrange(4)), float(chance.randrange(4))) for _ in range(size)]
        brute = [i for i, p in enumerate(points) if not any(is_beaten(p, q) for q in points)]
        assert pareto_front(points, lower=lower) == brute
    assert pareto_front([(math.nan, 1.0), (1.0, math.nan), (2.0, 2.0)], lower=lower) == [2]


def test_a_sweep_is_found_named_by_what_differs_and_sorted(tmp_path: Path) -> None:
    runs = find_runs(reports.sweep(tmp_path / "s", 11))
    assert [run.folder.name for run in runs] == [str(i) for i in range(11)], "2 comes before 10"
    assert [run.name for run in runs][:2] == ["ratio=0.10", "ratio=0.17"]
    together = compare(runs, [f"#{i}" for i in range(11)])
    assert (together.x, together.y) == ("final_latency_ms_64", "final_metrics_val/acc")
    values = [row.cells[together.columns.index(together.y)] for row in together.rows]
    assert values == sorted(values, key=lambda v: -(v or 0))
    pairs = [
        (r.report["final"]["latency_ms"]["64"], r.report["final"]["metrics"]["val/acc"])
        for r in runs
    ]
    best = {runs[i].name for i in pareto_front(pairs)}
    assert {row.name for row in together.rows if row.is_on_front} == best


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("latency", "final_latency_ms_64"),
        ("val/loss", "final_metrics_val/loss"),
        ("macs", "final_macs"),
        ("report/ratio_macs", "ratio_macs"),
        ("latency, batch 1 (ms)", "final_latency_ms_1"),
        ("memory_final_bytes", "memory_final_bytes"),
    ],
)
def test_axes_are_named_as_people_name_them(tmp_path: Path, asked: str, found: str) -> None:
    runs = find_runs(reports.sweep(tmp_path, 3))
    assert compare(runs, ["", "", ""], x=asked).x == found
    with pytest.raises(ValueError, match=r"no run has a number `speed`\. Found: .*\. Do: "):
        compare(runs, ["", "", ""], y="speed")


def test_what_is_better_can_be_said(tmp_path: Path) -> None:
    runs = find_runs(reports.sweep(tmp_path, 6))
    numbers = [(r.numbers()["final_macs"], r.numbers()["final_metrics_val/acc"]) for r in runs]
    given: dict[str, Any] = {"x": "macs", "y": "val/acc", "higher": ["macs"], "lower": ["val/acc"]}
    together = compare(runs, [""] * 6, **given)
    best = {runs[i].name for i in pareto_front(numbers, lower=(False, True))}
    assert {row.name for row in together.rows if row.is_on_front} == best


def test_no_secret_of_a_command_line_comes_onto_a_page(tmp_path: Path) -> None:
    words = ["logger.api_key=hunter2hunter2", "lr=0.1"]
    text = render([read_run(reports.written(tmp_path, reports.report(), words))])
    assert "hunter2" not in text and "logger.api_key=***" in text and "lr=0.1" in text


def test_runs_of_one_name_and_of_odd_names_stay_apart(tmp_path: Path) -> None:
    names = ["a/run", "b/run", "c/it's “odd” & ünï", "c/50% #1?", "d/-x"]
    folders = [reports.written(tmp_path / name, reports.report(i)) for i, name in enumerate(names)]
    runs = gather([*folders, folders[0]])
    assert [run.name for run in runs] == ["a/run", "b/run", "it's “odd” & ünï", "50% #1?", "-x"]
    seen = Seen(render(runs))
    assert [i for i in seen.ids if i.startswith("run-")] == [f"run-{i + 1}" for i in range(5)]
    assert set(seen.links) == {f"#run-{i + 1}" for i in range(5)}


def test_links_lead_nowhere(tmp_path: Path) -> None:
    secret = reports.written(tmp_path / "secret", {**reports.report(), "precision": "classified"})
    inside = tmp_path / "runs"
    reports.written(inside / "good", reports.report())
    (inside / "linked").symlink_to(secret)
    (inside / "file").mkdir()
    (inside / "file" / "report.json").symlink_to(secret / "report.json")
    (inside / "round").symlink_to(inside)
    (inside / "good" / "plan.json").symlink_to("/etc/hostname")
    runs = find_runs(inside)
    assert [run.folder.name for run in runs] == ["file", "good"]
    assert "leads out of the folder" in runs[0].problems[0] and "classified" not in render(runs)


# --- files ------------------------------------------------------------------------------------------


def test_a_page_replaces_a_page_and_nothing_else(tmp_path: Path) -> None:
    report = reports.written(tmp_path, reports.report()) / "report.json"
    assert write_page(report).name == "report.html" == write_page(report).name
    (tmp_path / "report.html").write_text("<!doctype html><p>mine")
    assert write_page(report).name == "report-1.html" and not is_free(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text().endswith("mine")


def told(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> tuple[str, str]:
    assert main(words) == code
    out, err = capsys.readouterr()
    return out, err


def test_the_command_writes_one_page_of_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = reports.sweep(tmp_path / "multi run", 3)
    out, _ = told(["report", str(sweep), "--pictures", "pics", "--title", "A & B"], capsys)
    assert out == f"Wrote {sweep / 'reports.html'} and 16 pictures in pics\n"
    assert "A &amp; B" in (sweep / "reports.html").read_text()
    assert all(ElementTree.parse(path) for path in Path("pics").glob("*.svg"))
    out, _ = told(["report", str(sweep / "0")], capsys)
    assert (sweep / "0" / "report.html").exists()
    out, _ = told(["report", str(sweep / "0"), str(sweep / "2" / "report.json"), "--json"], capsys)
    said = json.loads(out)
    assert said["page"] == "reports.html" and len(said["runs"]) == 2
    assert said["runs"][1]["final_params"] == reports.report(2, share=0.2)["final"]["params"]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["nowhere"], "there is no run here"),
        (["empty"], "there is no run here"),
        (["run", "--output", "page.pdf"], "a page is HTML"),
        (["run", "--output", "mine.html"], "there is another file, which is left alone"),
        (["sweep", "--x", "speed"], "no run has a number `speed`"),
        (["run", "--pictures", "taken"], ""),
        (["run", "--output", "taken/x.html"], ""),
    ],
)
def test_what_the_command_cannot_do_is_said_with_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], what: str
) -> None:
    reports.written(tmp_path / "run", reports.report())
    reports.sweep(tmp_path / "sweep", 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine.html").write_text("mine")
    (tmp_path / "taken").write_text("a file")
    _, err = told(["report", *words], capsys, 2)
    assert err.startswith(f"lightning-accel report: {what}")
    assert (tmp_path / "mine.html").read_text() == "mine"


def test_pictures_need_matplotlib_but_for_svg(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing = Drawing("a $x", 50, 20)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert plots.save(drawing, tmp_path / "a.svg").read_text().startswith("<svg ")
    with pytest.raises(AccelError, match=r"matplotlib.*Do: pip install 'lightning-accel\[plots\]'"):
        plots.save(drawing, tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a picture is SVG, PNG or PDF\. Found: .*a.jpg"):
        plots.save(drawing, tmp_path / "a.jpg")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_matplotlib_draws_the_same_shapes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install '.[plots]'")
    run = read_run(reports.written(tmp_path / "run", reports.report()))
    for name, drawing in drawings([run]).items():
        figure = plots._figure(drawing, tmp_path / "x.png")
        (axes,) = figure.axes
        kinds = [type(mark).__name__ for mark in drawing.marks]
        assert len(axes.patches) == kinds.count("Box") + kinds.count("Dot"), name
        assert len(axes.lines) == kinds.count("Line")
        assert len(axes.texts) == kinds.count("Label") + 1
        starts = {".png": b"\x89PNG", ".pdf": b"%PDF"}
        for ending, start in starts.items():
            assert plots.save(drawing, tmp_path / f"x{ending}").read_bytes()[:4] == start


# --- progress ---------------------------------------------------------------------------------------


class Clock:
    """Seconds that pass when told."""

    def __init__(self, cost: float) -> None:
        self.now, self.cost = 100.0, cost

    def __call__(self) -> float:
        self.now += self.cost
        return self.now


@pytest.mark.parametrize("cost", [0.0, 0.5])
def test_progress_takes_a_hundredth_of_the_time_at_most(tmp_path: Path, cost: float) -> None:
    clock = Clock(cost)
    progress = Progress(tmp_path / "report.json", clock)
    writes = []
    start = clock.now
    while clock.now < start + 300:
        clock.now += 0.05
        if clock.now >= progress.next:
            before = clock.now
            progress.write({"epoch": len(writes)})
            writes.append(clock.now - before)
    assert sum(writes) <= 0.025 * 300, "in this count, asking for the time is half of the cost"
    assert len(writes) > 5 and json.loads(progress.path.read_text())["epoch"] == len(writes) - 1


def test_a_file_that_is_no_progress_of_ours_stays(tmp_path: Path) -> None:
    mine = tmp_path / "report.progress.json"
    mine.write_text("mine")
    progress = Progress(tmp_path / "report.json")
    progress.write({"epoch": 1})
    progress.end()
    assert mine.read_text() == "mine" and not progress.is_due()


# --- a browser --------------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


@needs_browser
@pytest.mark.slow
def test_a_browser_shows_the_page_and_follows_clicks(tmp_path: Path) -> None:
    sweep = reports.sweep(tmp_path / "sweep", 12)
    runs = find_runs(sweep)
    page = tmp_path / "it's 100% of “runs”.html"
    page.write_text(render(runs), encoding="utf-8")
    with Browser(tmp_path / "home") as browser:
        browser.open(page.as_uri())
        _shows_all(browser, runs)
        _leads_to_runs(browser)
        _sorts(browser)
        _looks(browser, tmp_path)
        assert browser.said == [], "errors of scripts, and of the page's own policy"
        assert [url for url in browser.requests if not url.startswith("file:")] == []


def _shows_all(browser: Browser, runs: list[Run]) -> None:
    rows = browser.ask("[...document.querySelectorAll('table.sortable tbody tr')].map(r => [...r.cells].map(c => c.innerText.trim()))")  # fmt: skip
    heads = browser.ask("[...document.querySelectorAll('table.sortable th')].map(h => h.innerText)")
    assert len(rows) == len(runs)
    by_name = {run.name: run.report for run in runs}
    for name, *cells in rows:
        shown = dict(zip(heads[1:], cells, strict=True))
        report = by_name[name]
        assert shown["val/acc"] == show(report["final"]["metrics"]["val/acc"])
        assert shown["latency, batch 64 (ms)"] == show(report["final"]["latency_ms"]["64"])
        assert shown["MACs"] == show(report["final"]["macs"])
    assert browser.ask("document.querySelectorAll('svg.chart circle').length") > len(runs)


def _leads_to_runs(browser: Browser) -> None:
    links = browser.ask(
        "[...document.querySelectorAll('svg.chart a')].map(a => a.getAttribute('href'))"
    )
    assert len(links) == 12
    for place in (0, 7):
        inside = f"document.querySelector({json.dumps(links[place])})"
        assert browser.ask(f"{inside}.open") is False
        browser.click(f"svg.chart a[href='{links[place]}'] circle")
        assert browser.ask(f"{inside}.open") is True
        top = browser.ask(f"{inside}.getBoundingClientRect().top")
        assert browser.ask("location.hash") == links[place] and top < 900
    tip = browser.ask(
        f"document.querySelector(\"svg.chart a[href='{links[7]}'] title\").textContent"
    )
    assert browser.ask(f"document.querySelector({json.dumps(links[7])}).innerText").startswith(
        tip.partition(":")[0]
    )


def _sorts(browser: Browser) -> None:
    place = (
        "[...document.querySelectorAll('table.sortable th')].findIndex(h => h.innerText == 'MACs')"
    )
    column = browser.ask(place) + 1
    read = f"[...document.querySelectorAll('table.sortable td:nth-child({column})')].map(c => Number(c.dataset.value))"
    for way in (1, -1):
        browser.click(f"table.sortable th:nth-child({column}) button")
        values = browser.ask(read)
        assert values == sorted(values, key=lambda value: way * value) and len(set(values)) == 12


def _looks(browser: Browser, folder: Path) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    colours = []
    for scheme in ("light", "dark"):
        browser.look_like(scheme=scheme)
        colours.append(browser.ask(ground))
        assert browser.picture(folder / f"{scheme}.png").stat().st_size > 20_000
    assert colours == ["rgb(255, 255, 255)", "rgb(20, 24, 31)"]
    browser.resize(390, 800)
    assert browser.ask("document.documentElement.scrollWidth") == 390, (
        "nothing sticks out on a phone"
    )
    browser.look_like(scheme="dark", media="print")
    assert browser.ask(ground) == "rgb(255, 255, 255)", "paper is white"
    assert browser.prints(folder / "page.pdf").read_bytes()[:5] == b"%PDF-"


@pytest.mark.parametrize(
    "text", ["", "{", "[1, 2]", '{"name": "somebody else"}', "\x00\x01", "NaN"]
)
def test_a_report_of_a_broken_or_foreign_file_fails_and_names_it(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken" / "report.json"
    broken.parent.mkdir()
    broken.write_text(text)
    for named in (broken, broken.parent):
        assert main(["report", str(named)]) == 2
        said = capsys.readouterr().err
        assert str(broken) in said and "no page was written" in said
    assert not list(tmp_path.rglob("*.html"))
    whole = tmp_path / "whole" / "report.json"
    whole.parent.mkdir()
    whole.write_text('{"dense": {"params": 3}, "final": {"params": 2}}')
    assert main(["report", str(tmp_path)]) == 1  # a page of what could be read, and the other named
    said = capsys.readouterr()
    assert "broken: " in said.err and "Wrote" in said.out
    (page,) = tmp_path.glob("*.html")
    assert (
        'data-name="broken"><summary>broken <span class="state worse">could not be read'
        in page.read_text()
    )
    assert main(["report", str(whole)]) == 0
