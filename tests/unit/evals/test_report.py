"""The report page: complete, self-contained, and working in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qwen2kit.errors import ConfigError
from qwen2kit_evals.contamination import check_contamination
from qwen2kit_evals.report import Report, build_report, check_report_path, write_report
from qwen2kit_evals.stored_run import read_run
from tests.unit.evals.stored_runs import row, sample, write_run

NASTY = "</script><img src=x onerror=alert(1)> & | pipe"
SHOTS = "Q: one\nA: 1\n\n"
PAIR = [[-1.0, True], [-2.5, False]]
QUESTION = " ".join(f"w{i}" for i in range(20))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    home = tmp_path_factory.mktemp("runs")
    absent = {
        "benchmark": "CMMLU", "part": "", "absent": "no data", "task": "cmmlu", "shots": 5,
    }  # fmt: skip
    scored = {
        "benchmark": "MMLU", "part": "", "value": 44.0, "stderr": 1.5, "shots": 5,
        "task": "qwen2_mmlu", "samples": 100, "size": 14042, "absent": "",
        "beside": {"other_parser": 43.0},
    }  # fmt: skip
    for name, right in (("one", 1.0), ("two", 0.0)):
        choices = [
            sample(
                i, {"acc": right if i else 1.0}, responses=PAIR, prompt=f"{SHOTS}Q: {i} {NASTY}\nA:"
            )
            for i in range(30)
        ]
        texts = [sample(0, {"exact_match": right}, responses=[f"It is {NASTY}"], prompt="Only")]
        texts[0]["prompt_hash"] = name
        write_run(
            home / name, {"choice": choices, "text": texts},
            [row("choice", 0.5), row("text", right, metric="exact_match", stderr=None)],
            [scored, absent], suite="qwen2-base",
        )  # fmt: skip
    found = check_contamination([QUESTION], {"choice": [QUESTION] + [f"q {i}" for i in range(29)]})
    runs = [read_run(home / name) for name in ("one", "two")]
    return build_report(runs, compare="qwen2-0.5b", contamination=found, samples=25)


@pytest.fixture(scope="module")
def page(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(report, path)
    return path


class Links(HTMLParser):
    """Collects what a page would load, and the text of its data element."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.data = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [str(v) for k, v in attrs if k in ("src", "href", "action", "srcset")]

    def handle_data(self, data: str) -> None:
        if data.startswith('{"runs"'):
            self.data = data


def test_page_loads_nothing_and_holds_every_sample(page: Path, report: Report) -> None:
    links = Links()
    links.feed(page.read_text())
    assert links.loads == []
    assert not {"link", "img", "iframe", "object"} & set(links.tags)
    assert links.tags.count("script") == 2
    assert not re.search(r"url\(|@import|fetch\(|XMLHttp", page.read_text())
    data = json.loads(links.data)
    assert data == json.loads(json.dumps(report.browser))
    choice, text = data["tasks"]
    assert (choice["name"], choice["total"], len(choice["docs"])) == ("choice", 30, 25)
    assert choice["prefix"] == SHOTS
    assert choice["docs"][3]["prompt"] == f"Q: 3 {NASTY}\nA:"
    assert [answer["right"] for answer in choice["docs"][3]["answers"]] == [True, False]
    assert choice["docs"][0]["answers"][0]["choices"] == [[" c0", -1.0], [" c1", -2.5]]
    assert (choice["docs"][3]["prompts"], text["docs"][0]["prompts"]) == (1, 2)
    assert text["docs"][0]["answers"][1]["text"] == f"It is {NASTY}"


def test_page_says_what_the_comparison_says(page: Path) -> None:
    text = page.read_text()
    assert "not comparable: subset: 100 of 14,042 questions" in text
    assert "not run: no data" in text
    assert "unverified, 5 shots" in text  # the 0.5B's figure is recalled, not read
    assert "same answers, other parser" in text
    assert 'style="width:44.0%"' in text
    assert "3.3 %" in text  # one question of thirty is contaminated


def test_markdown_has_the_same_tables(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert "| MMLU | 44.00 | ±1.50 | 5 | 45.4 | 5 | unverified | not comparable: subset" in text
    assert "| choice | acc | 0.5000 ±0.0100 | 4 | 5 | 0.5000 ±0.0100 | 4 | 5 |" in text
    widths = [line.count("|") for line in text.split("## All metrics")[1].splitlines() if line]
    assert set(widths) == {9}


def test_without_a_paper_the_bars_are_of_the_tasks(tmp_path: Path) -> None:
    samples = {"t": [sample(0, {"acc": 1.0}, responses=PAIR)]}
    runs = [read_run(write_run(tmp_path / n / "run", samples, [row("t", 0.5)])) for n in "ab"]
    report = build_report(runs, compare=None, contamination=None, samples=5)
    assert report.names == ("1: run", "2: run")
    assert [(bar.label, bar.value) for bar in report.charts["t, acc"]] == [
        ("1: run", 50.0),
        ("2: run", 50.0),
    ]
    write_report(report, tmp_path / "r.html")
    assert "beside the paper" not in (tmp_path / "r.html").read_text()
    with pytest.raises(ConfigError, match="must not be negative"):
        build_report(runs, compare=None, contamination=None, samples=-1)
    with pytest.raises(ConfigError, match=r"a report is a \.html or \.md file"):
        check_report_path(Path("report.pdf"))


def browse(page: Path, profile: Path, *options: str) -> str:
    browser = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if browser is None:
        pytest.skip("no Chromium found")
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
         "--disable-background-networking", "--disable-sync", f"--user-data-dir={profile}",
         *options, page.as_uri()],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return done.stdout


def test_browser_shows_filters_and_pages(page: Path, tmp_path: Path) -> None:
    """A second script drives the page's controls and writes what they show into its title."""
    driver = """<script>
    const seen = [];
    const note = () => seen.push([at("place").textContent, at("samples").children.length]);
    const set = (id, value) => { at(id).value = value; at(id).dispatchEvent(new Event("input")); };
    note(); at("on").click(); note();
    set("show", "wrong 1"); note(); set("show", "differ"); set("search", "Q: 17 <"); note();
    set("search", "onerror"); set("show", "all"); set("task", "1"); note();
    document.title = JSON.stringify([seen, document.querySelectorAll("img").length]);
    </script></body>"""
    driven = tmp_path / "driven.html"
    driven.write_text(page.read_text().replace("</body>", driver))
    shown: Any = browse(driven, tmp_path / "profile", "--dump-dom")
    (title,) = re.findall(r"<title>(.*?)</title>", shown)
    seen, images = json.loads(title)
    assert seen == [
        ["25 samples, page 1 of 2", 20],
        ["25 samples, page 2 of 2", 5],
        ["24 samples, page 1 of 2", 20],
        ["1 sample, page 1 of 1", 1],
        ["1 sample, page 1 of 1", 1],
    ]
    assert images == 0


def test_failed_tasks_are_told_with_the_run_they_belong_to(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_run(tmp_path / name, {}, [row("choice", 0.5)])
    path = tmp_path / "two" / "results.json"
    document = json.loads(path.read_text())
    document["failed"] = [{"task": "gsm8k", "reason": "no room | for <it>"}]
    document["benchmarks"] = [
        {"benchmark": "GSM8K", "part": "", "absent": "failed: no room"},
        {"benchmark": "CMMLU", "part": "", "absent": "no data"},
    ]
    path.write_text(json.dumps(document))
    runs = [read_run(tmp_path / name) for name in ("one", "two")]
    found = build_report(runs, compare=None, contamination=None, samples=0)
    for kind in ("html", "md"):
        write_report(found, tmp_path / f"r.{kind}")
    page, text = (tmp_path / "r.html").read_text(), (tmp_path / "r.md").read_text()
    assert "<h2>Failed in two</h2>" in page
    assert "no room | for &lt;it&gt;" in page
    assert "## Failed in two" in text
    assert r"| gsm8k | no room \| for <it> |" in text
    for written in (page, text):
        assert "in one" not in written.split("All metrics")[0]
        assert written.count("GSM8K") == 0  # failed, not left out
        assert "Not run by two" in written
