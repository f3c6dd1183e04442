"""The process that executes a run in the background: ``python -m dynkit.pipeline.worker WORKSPACE RUN``."""

import faulthandler
import logging
import sys

from dynkit.catalog import Catalog
from dynkit.pipeline.declaration import Pipeline
from dynkit.pipeline.owner import Owner
from dynkit.pipeline.payload import load
from dynkit.pipeline.replay import replay

__all__: list[str] = []


def main() -> None:
    """Load the run's pipeline and drive its loop to the end."""
    root, run = sys.argv[1:]
    faulthandler.enable()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    for event in replay(_pipeline, Owner(Catalog(root), run)):
        logging.info("%s", event)


def _pipeline(owner: Owner) -> Pipeline:
    return Pipeline(dataset=owner.dataset, **load(owner.folder))


if __name__ == "__main__":
    main()
