"""The guide of the lineage runs as it is written."""

from pathlib import Path

import pytest
from test_docs import blocks_of


def test_the_guide_of_the_lineage_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    said = []
    for block in blocks_of("lineage.md"):
        body, last = block.strip().rsplit("\n", 1)
        exec(body, names)
        said.append(eval(last, names))
    card, placed, tested, merge, plan, report, pushed = said
    assert card.names == ("small",)
    assert placed[0].confidence > 0.9
    assert len(tested) == 5
    assert merge.kind == "possible conflict"
    assert [step.action for step in plan.steps] == ["rebuild"]
    assert report.done
    assert len(pushed.models) == 1
