"""From what a user names to batches of images: sources, labels, preprocessing, loading.

`find_samples` lists images, `label_map` finds their labels for a model's head, `Preprocessing` says how images
become tensors, and `make_loader` puts these together for evaluation, `make_train_batches` for training.
"""

from cpvit.data.archives import BadArchiveError
from cpvit.data.augment import Augmentation, Mixing
from cpvit.data.images import BadImageError
from cpvit.data.labels import label_map
from cpvit.data.loader import Batch, Batches, make_loader
from cpvit.data.preprocess import Preprocessing
from cpvit.data.records import ImageSource, Sample, split_samples
from cpvit.data.shard_index import ShardSource
from cpvit.data.shards import open_shards
from cpvit.data.sources import find_samples, open_data
from cpvit.data.training import TrainBatch, TrainBatches, TrainLoaderOptions, make_train_batches

__all__ = [
    "Augmentation",
    "BadArchiveError",
    "BadImageError",
    "Batch",
    "Batches",
    "ImageSource",
    "Mixing",
    "Preprocessing",
    "Sample",
    "ShardSource",
    "TrainBatch",
    "TrainBatches",
    "TrainLoaderOptions",
    "find_samples",
    "label_map",
    "make_loader",
    "make_train_batches",
    "open_data",
    "open_shards",
    "split_samples",
]
