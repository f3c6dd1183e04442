"""What people see: exported pages and live notebooks, in a real browser, without a network."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import Browser, Page, expect

TESTS = Path(__file__).parents[1]
SETUP = f"""
import sys, time; sys.path.insert(0, {str(TESTS)!r})
import dynkit as dk
from streams import make_frame
from torch import nn
%load_ext dynkit
ws = dk.Workspace()
stream = ws.ingest("stream", make_frame(), timestamp="when", label="late")
class Slow(nn.Linear):
    def forward(self, x):
        time.sleep(0.02)
        return super().forward(x)
def make_model():
    return Slow(3, 2)
"""
PIPELINE = """%%pipeline flow -o run
dataset: stream
model: make_model
trigger: {amount: 500}
selection: new
training: {batch_size: 50, lr: 1e-2}
evaluation: {windows: {tumbling: 3d}, metrics: [roc_auc]}
"""
SHOW = """
comparison = dk.compare([run])
display(comparison, dk.plots.matrix(run.matrix()), dk.plots.cost(comparison.frame), ws.runs())
"""


def write(path: Path, *cells: str) -> Path:
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=[new_code_cell(cell) for cell in cells], metadata=kernel), path)
    return path


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A notebook executed by `dynkit batch`; its page is beside it."""
    folder = tmp_path_factory.mktemp("executed")
    path = write(folder / "flow.ipynb", SETUP, PIPELINE, SHOW)
    command = [sys.executable, "-c", "from dynkit.cli import main; main()", "batch", str(path), "-o", "out", "--html"]
    env = {**os.environ, "DYNKIT_WORKSPACE": str(folder / "ws")}
    subprocess.run(command, check=True, capture_output=True, cwd=folder, env=env)
    return folder / "out/flow.ipynb"


def loaded_pictures(page: Page) -> list[bool]:
    """For each picture of a result: is it really drawn?"""
    pictures = page.locator("figure img[src^='data:image/svg+xml']")
    return [picture.evaluate("image => image.complete && image.naturalWidth > 300") for picture in pictures.all()]


def test_an_executed_notebook_shows_its_charts_as_a_page(page: Page, executed: Path, tmp_path: Path) -> None:
    page.goto(executed.with_suffix(".html").as_uri())
    expect(page.get_by_text("finished").first).to_be_visible()
    page.wait_for_function("() => [...document.images].every(image => image.complete)")
    assert loaded_pictures(page) == [True] * 4
    assert page.locator("td", has_text="roc_auc").first.is_visible()
    assert page.locator("figure img").first.get_attribute("alt") == "roc_auc of the composite model over time"
    page.screenshot(path=tmp_path / "page.png", full_page=True)


def test_an_untrusted_notebook_shows_its_charts_in_lab(page: Page, executed: Path, lab: object) -> None:
    (lab.folder / "received.ipynb").write_bytes(executed.read_bytes())  # type: ignore[attr-defined]
    lab.open(page, "received.ipynb")  # type: ignore[attr-defined]
    pictures = page.locator(".jp-OutputArea figure img[src^='data:image/svg+xml']")
    expect(pictures.first).to_be_visible(timeout=30_000)
    assert loaded_pictures(page)[0]


def test_the_view_of_a_run_moves_in_lab_until_it_shows_the_result(
    browser: Browser, lab: object, tmp_path: Path
) -> None:
    write(lab.folder / "live.ipynb", SETUP, PIPELINE, "print('free', 1 + 1)")  # type: ignore[attr-defined]
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    lab.open(page, "live.ipynb")  # type: ignore[attr-defined]
    lab.run_cell(page, 0)  # type: ignore[attr-defined]
    lab.run_cell(page, 1)  # type: ignore[attr-defined]
    output = page.locator(".jp-Notebook .jp-Cell").nth(1).locator(".jp-OutputArea")
    bar = output.locator("progress")
    expect(bar).to_be_visible(timeout=60_000)
    lab.run_cell(page, 2)  # type: ignore[attr-defined]
    expect(page.locator(".jp-Notebook .jp-Cell").nth(2).locator(".jp-OutputArea")).to_contain_text("free 2")
    expect(output).to_contain_text("training model", timeout=60_000)
    seen = {bar.get_attribute("value")}
    for _ in range(200):
        if len(seen) >= 4:
            break
        page.wait_for_timeout(100)
        seen.add(bar.get_attribute("value", timeout=5000))
    assert len(seen) >= 4
    page.screenshot(path=tmp_path / "live.png")
    expect(output.locator("figure img")).to_be_visible(timeout=120_000)
    expect(output).to_contain_text("finished")
    page.screenshot(path=tmp_path / "done.png")
    page.close()
