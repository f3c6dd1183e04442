"""Datasets: growing, versioned collections of samples on disk.

A dataset is a folder that any Zarr and Arrow tool can read::

    versions/00000007.json   manifest: schema, segments, parent; its creation is the commit
    segments/<id>.zarr/      one Zarr v3 array per field, sharded, immutable
    segments/<id>.arrow      key, timestamp, label and scalar columns of the same rows

Data flows from `ingest` (what a user has becomes an index table and arrays) through `segments` (arrays to Zarr and
back as memory-mapped tensors) to `Dataset` (versions, tables, reads).
"""

from dynkit.data.dataset import Dataset, check_name
from dynkit.data.version import Version

__all__ = ["Dataset", "Version", "check_name"]
