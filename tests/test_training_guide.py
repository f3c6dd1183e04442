"""The guide's code runs as it is written."""

import re
from pathlib import Path
from typing import Any

from test_docs import readings

import dynkit as dk


def test_the_guide_of_training_runs(ws: dk.Workspace) -> None:
    guide = (Path(__file__).parents[1] / "docs/guides/train-your-way.md").read_text()
    frame = readings("2024-01-01T00:00", 1000)
    stream = ws.ingest("stream", frame, timestamp="time", label="broken", features=["heat", "noise"])
    names: dict[str, Any] = {"__name__": "__main__", "ws": ws, "stream": stream}
    for block in re.findall(r"```python\n(.*?)```", guide, re.DOTALL):
        exec(block, names)
    runs = names["runs"]
    assert {run.status for run in runs.values()} == {"finished"}
    for name, run in runs.items():
        assert len(run.trained) == 2
        assert run.composite()["value"].tail(1).item() > 0.6, name
    assert next(event for event in runs["selective"].events() if event.kind == "trained").data["kept"] > 0
