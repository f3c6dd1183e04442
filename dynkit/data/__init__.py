"""Datasets: growing, versioned collections of samples on disk.

A dataset is a folder, or a prefix of a bucket, that any Zarr and Arrow tool can read::

    versions/00000007.json   manifest: schema, segments, tombstones, labels, splits; its creation is the commit
    segments/<id>.zarr/      one Zarr v3 array per field, sharded, immutable
    segments/<id>.arrow      key, timestamp, label and scalar columns of the same rows
    tombstones/<id>.arrow    deleted keys
    labels/<id>.arrow        labels that came late
    sources/<id>.arrow       watched files that were read

Data flows in from `sources` (what a user has becomes blocks) through `prepare` (a block becomes an index table and
stored fields, as `fields` and `labels` say) and `writing` (blocks become `segments` of `shards`, published by
`manifest`) to `store`; and out through `version` (keys become rows, rows of `arrays` become tensors) and `batches`.
"""

from dynkit.data.batches import Batch, Batches, slice_batch
from dynkit.data.creation import create, ingest
from dynkit.data.dataset import Dataset, as_keys, check_name
from dynkit.data.labels import MISSING
from dynkit.data.splits import held_out, in_split
from dynkit.data.version import Version

__all__ = [
    "MISSING",
    "Batch",
    "Batches",
    "Dataset",
    "Version",
    "as_keys",
    "check_name",
    "create",
    "held_out",
    "in_split",
    "ingest",
    "slice_batch",
]
