"""The documentation's code runs as it is written."""

import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import dynkit as dk

DOCS = Path(__file__).parents[1] / "docs"


def blocks_of(guide: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / "guides" / guide).read_text(), re.DOTALL)


def readings(start: str, rows: int) -> pl.DataFrame:
    rng = np.random.default_rng(0)
    heat, noise = rng.normal(size=(2, rows))
    time = np.datetime64(start) + np.arange(rows) * np.timedelta64(1, "h").astype("timedelta64[us]")
    return pl.DataFrame(
        {"time": time, "heat": heat, "noise": noise, "place": "hall", "broken": (heat > noise).astype(int)}
    )


def test_the_guide_takes_a_users_csv_and_arrays_through_all_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    readings("2024-01-01T00:00", 1000).write_csv("readings.csv")
    readings("2024-03-01T00:00", 50).write_csv("more.csv")
    results = []
    for block in blocks_of("bring-your-own-data.md"):
        assert len([line for line in block.splitlines() if line.strip()]) < 15
        body, last = block.strip().rsplit("\n", 1)
        names: dict[str, object] = {"__name__": "__main__"}
        exec(body, names)
        results.append(eval(last, names))
    curve, scores, (version, rows) = results
    assert curve["value"].tail(1).item() > 0.5
    assert scores["metric"].to_list() == ["accuracy"]
    assert (version, rows) == (2, 1000)


def test_the_guide_of_growing_data_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    readings("2024-01-01T00:00", 1000).write_csv("readings.csv")
    readings("2024-03-01T00:00", 50).write_csv("more.csv")
    for block in blocks_of("data-that-grows.md"):
        exec(block, {"__name__": "__main__"})
    assert len(dk.Workspace("my-workspace").dataset("sensor")) == 1050


def test_links_between_pages_lead_somewhere() -> None:
    root = DOCS.parent
    for page in [root / "README.md", root / "CONTRIBUTING.md", *DOCS.glob("*.md"), *DOCS.glob("*/*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_guide_of_drift_says_what_it_prints() -> None:
    names: dict[str, object] = {}
    said = []
    for block in blocks_of("has-the-data-changed.md"):
        body, last = block.strip().rsplit("\n", 1)
        exec(body, names)
        said.append(eval(last, names))
    guide = (DOCS / "guides" / "has-the-data-changed.md").read_text()
    assert said[0].drifted
    assert said[0].score == pytest.approx(float(re.search(r"score=([\d.]+)", guide)[1]), rel=0.01)
    assert dict(said[1].select("column", "drifted").iter_rows()) == {"heat": True, "place": False}
    assert said[2].low < said[2].estimate < said[2].high


@pytest.mark.parametrize("guide", ["when-to-train.md", "write-a-policy.md"])
def test_the_guides_of_policies_run(guide: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks_of(guide):
        exec(block, names)
    run = names["run"]
    assert isinstance(run, dk.Run)
    assert run.status == "finished", run.error
    assert len(run.trained) > 1
    assert run.decisions().height > 5
    if "sweep" in names:
        assert [one.status for one in names["sweep"].runs] == ["finished"] * 4  # type: ignore[attr-defined]


def test_the_guide_of_models_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks_of("keep-every-model.md"):
        exec(block, names)
    evidence = names["evidence"]
    assert isinstance(evidence, dict)
    assert evidence["accepted"]
    assert evidence["largest_error"] <= 1.01e-4
    assert len(dk.Workspace("my-workspace").models) == 2
