"""Once through a collection: predictions and embeddings of every image, into Parquet. See docs/bulk.md."""

from cpvit.bulk.parts import read_description
from cpvit.bulk.ray_engine import PartMaker
from cpvit.bulk.requirements import MissingPackageError
from cpvit.bulk.sources import Source

__all__ = ["MissingPackageError", "PartMaker", "Source", "read_description"]
