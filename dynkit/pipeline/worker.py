"""The process that executes a run in the background: ``python -m dynkit.pipeline.worker WORKSPACE RUN``."""

import faulthandler
import logging
import sys

from dynkit.catalog import Catalog
from dynkit.pipeline.owner import Cancelled, Owner
from dynkit.pipeline.payload import load
from dynkit.pipeline.replay import replay

__all__: list[str] = []


def main() -> None:
    """Load the run's pipeline and drive its loop to the end."""
    root, run = sys.argv[1:]
    faulthandler.enable()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    catalog = Catalog(root)
    try:
        with Owner(catalog, run) as owner:  # a pipeline that cannot be loaded is the run's failure
            pipeline = load(owner.folder)
        for event in replay(pipeline, Owner(catalog, run)):
            logging.info("%s", event)
    except Cancelled:
        logging.info("cancelled")


if __name__ == "__main__":
    main()
