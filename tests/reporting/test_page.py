"""The page as a browser reads it: HTML, SVG, escaping, contrast, size."""

import json
import os
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from html_page import Page
from written_runs import evaluation_results, train_record, write_run

import lumi.reporting.page
from lumi.cli import dispatch
from lumi.config import UserError
from lumi.reporting.page import _differences, write_report
from lumi.reporting.recorded_run import read_runs


def run(folder, losses=(5.0, 4.0, 3.5), **more):
    records = [train_record(step, loss) for step, loss in enumerate(losses, start=1)]
    validation = {"step": len(records), "kind": "validation", "loss": 3.75, "bits_per_byte": 1.5}
    return write_run(folder, [*records, validation], **more)


def test_two_runs_on_one_page(tmp_path):
    first = run(tmp_path / "first", config={"num_steps": 3, "optimizer": {"peak_lr": 0.1}})
    second = run(
        tmp_path / "second", config={"num_steps": 9, "optimizer": {"peak_lr": 0.1}}, status="running"
    )
    notes = write_report([first, second], tmp_path / "report.html")
    assert notes == ["second: The run was in progress, or was killed: its curves end where its records did."]
    page = Page(tmp_path / "report.html")
    for text in ("first", "second", "3 of 9", "3.7500", "1.5000", "in progress, or was killed", "num_steps"):
        assert page.has(text), text
    differing = page.source[page.source.index("Where their configs differ") :]
    assert "peak_lr" not in differing[: differing.index("</table>")]
    charts = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page.source, re.DOTALL)]
    loss = next(chart for chart in charts if chart.findtext("title") == "Loss")
    assert {line.get("class").split()[2] for line in loss.iter("polyline")} == {"run0", "run1"}
    assert len(list(loss.iter("circle"))) == 2
    assert "first, validation: 3.75 at step 3" in loss.findtext("desc")


def test_a_section_that_a_run_has_not_is_one_difference(tmp_path):
    lora = {"rank": 4, "targets": ["a", "b"]}
    first = run(tmp_path / "first", config={"lora": None, "same": {"x": 1}, "names": ["a"]})
    second = run(tmp_path / "second", config={"lora": lora, "same": {"x": 1}, "names": ["a", "b"], "new": 1})
    third = run(tmp_path / "third", config={"lora": lora | {"rank": 8}, "same": {"x": 1}, "names": ["a"]})
    runs = read_runs([first, second, third])
    assert _differences(runs[:2]) == [
        ("lora", ["null", json.dumps(lora)]),
        ("names", ['["a"]', '["a", "b"]']),
        ("new", ["–", "1"]),
    ]
    assert _differences(runs[1:])[0] == ("lora.rank", ["4", "8"])


def test_the_page_needs_nothing_else(tmp_path):
    page = Page((write_report([run(tmp_path / "a")], tmp_path / "r.html"), tmp_path / "r.html")[1])
    assert page.needs_nothing_else()
    assert "style" not in {name for name, _ in page.attributes}


def test_text_of_runs_stays_text(tmp_path):
    name, evil = "<script>alert(1)<", "\"'><script>alert(2)</script>{{ 7 * 7 }}"
    folder = run(tmp_path / name, config={"num_steps": 3, evil: evil}, status="failed", message=evil)
    results = evaluation_results(evil)
    results["smoke_tests"]["answers"][0]["answer"] = evil
    (folder / "evaluation_results.json").write_text(json.dumps(results))
    write_report([folder, run(tmp_path / "b")], tmp_path / "r.html")
    page = Page(tmp_path / "r.html")
    assert "script" not in page.tags
    assert page.has(name)
    assert page.has(f"The run failed: {evil}.")
    assert evil in page.text


def test_odd_states_of_a_run_make_a_page(tmp_path):
    empty = write_run(tmp_path / "empty", [])
    write_report([empty], tmp_path / "r.html")
    assert Page(tmp_path / "r.html").has("There is nothing to draw yet.")
    damaged = run(tmp_path / "damaged", tail='{"step": 4, "kind": "tr')
    (damaged / "config.json").unlink()
    notes = write_report([damaged, empty], tmp_path / "r.html")
    assert [note.split(":")[0] for note in notes] == ["damaged", "damaged", "empty"]
    assert Page(tmp_path / "r.html").has("1 line of metrics.jsonl is no record")
    huge = train_record(1, 10**400, tokens=10**400, skipped_steps=10**400, mfu=float("nan"), lr="fast")
    write_report([write_run(tmp_path / "huge", [huge])], tmp_path / "r.html")
    assert Page(tmp_path / "r.html").has("1 of 100")
    eight = [run(tmp_path / f"run{number}") for number in range(8)]
    write_report(eight, tmp_path / "r.html")
    assert 'run6"' not in Page(tmp_path / "r.html").source


def test_a_hundred_thousand_records_make_a_small_page(tmp_path):
    losses = [2 + 6 / (1 + step / 500) + 0.1 * (step % 7) for step in range(100_000)]
    losses[70_001] = 30.0
    write_report([run(tmp_path / "long", losses)], tmp_path / "r.html")
    assert (tmp_path / "r.html").stat().st_size < 500_000
    assert Page(tmp_path / "r.html").has("30")


def contrast(one, other):
    """The contrast ratio of WCAG 2.2 of two colours such as #1f5fbf."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(c * weight for c, weight in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))

    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_contrast_and_words_for_those_who_do_not_see(tmp_path):
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    write_report([run(tmp_path / "a")], tmp_path / "r.html")
    page = Page(tmp_path / "r.html")
    themes = re.findall(r":root \{(.*?)\}", page.source, re.DOTALL)
    assert len(themes) == 2
    for theme in themes:
        colours = dict(re.findall(r"--(\w+): (#\w{6});", theme))
        for name in ("text", "quiet", *(f"run{number}" for number in range(6))):
            assert contrast(colours[name], colours["back"]) >= 4.5, name
        assert contrast(colours["text"], colours["raised"]) >= 4.5
    attributes = [name for name, _ in page.attributes]
    assert page.tags.count("figure") == attributes.count("aria-labelledby") == page.tags.count("desc")
    assert ("lang", "en") in page.attributes
    assert page.tags.count("th") == attributes.count("scope")


def test_where_it_goes(tmp_path, capsys):
    folder = run(tmp_path / "a")
    assert dispatch(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"wrote {folder / 'report.html'}\n"
    assert (folder / "report.html").exists()
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "evaluation_results.json").write_text(json.dumps(evaluation_results("elsewhere")))
    output = tmp_path / "page.html"
    dispatch(["report", str(folder), "--output", str(output), "--evaluations", str(tmp_path / "e")])
    assert Page(output).has("elsewhere")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "e", "page.html"}
    with pytest.raises(UserError, match="--output must be a file, got the folder"):
        write_report([folder], tmp_path)
    for place in (tmp_path / "nowhere" / "r.html", Path("/proc/r.html"), folder / "config.json" / "r.html"):
        with pytest.raises(UserError, match=f"must be a file in a folder that takes files, got {place};"):
            write_report([folder], place)


def test_only_a_page_of_its_own_is_replaced(tmp_path):
    folder, page, link = run(tmp_path / "a"), tmp_path / "r.html", tmp_path / "link.html"
    link.symlink_to(page)
    for losses in ((5.0,), (6.0, 7.25)):
        (folder / "metrics.jsonl").write_text(json.dumps(train_record(1, losses[-1])) + "\n")
        write_report([folder], link)
        assert link.is_symlink()
        assert Page(page).has(f"{losses[-1]:.4f}")
    template = (Path(lumi.reporting.page.__file__).parent / "report.html.jinja").read_text()
    for mine in (b"", b"<!DOCTYPE html><title>mine</title>", b"\0\xff", template.encode()):
        page.write_bytes(mine)
        for output in (page, link):
            with pytest.raises(UserError, match=rf"--output must be new, .* got {output}, .*; remove it or"):
                write_report([folder], output)
        assert page.read_bytes() == mine
    page.unlink()
    page.symlink_to(page)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="--output must be new, "):
        write_report([folder], page)
    with pytest.raises(UserError, match="--output must be new, "):
        write_report([folder], tmp_path / "pipe")
    assert not [path for path in tmp_path.rglob("*") if ".tmp-" in path.name]


def test_the_command_says_on_stderr_what_a_reader_must_know(tmp_path, capsys):
    folder = write_run(tmp_path / "a", [], tail="[]\n{}\n")
    assert dispatch(["report", str(folder)]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"wrote {folder / 'report.html'}\n"
    line = "All 2 lines of metrics.jsonl are no records: there is nothing to draw."
    assert captured.err == f"a: {line}\n"
    assert Page(folder / "report.html").has(line)
