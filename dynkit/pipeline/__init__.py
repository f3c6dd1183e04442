"""Pipelines and their runs: declared once, replayed by one loop, watched through the catalog."""

from dynkit.pipeline.declaration import Pipeline
from dynkit.pipeline.json_schema import schema
from dynkit.pipeline.run import Run, Runs
from dynkit.pipeline.spec import build

__all__ = ["Pipeline", "Run", "Runs", "build", "schema"]
