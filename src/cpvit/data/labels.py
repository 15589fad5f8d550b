"""Which output of a model's head belongs to which class folder."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cpvit.data.layout import is_wordnet_id
from cpvit.data.order import Numbers
from cpvit.data.records import ImageSource
from cpvit.data.shard_index import ShardSource


def label_map(source: ImageSource, num_classes: int) -> dict[str, int]:
    """Class folder -> index of the head's output; for shards, the index as they hold it -> itself.

    Folders named by WordNet ids get the index of that id in the ImageNet variant which timm knows for a head
    of `num_classes` outputs (1000: ImageNet-1k), so a subset of the classes is labelled right. Otherwise the
    folders, sorted by name, are 0 .. n-1, and n must be `num_classes`. CIFAR's classes come out in their
    official order.

    Example:
        >>> label_map(find_samples("imagenet-val.tar"), 1000)["n01440764"]  # doctest: +SKIP
        0
    """
    if num_classes < 1:
        raise ValueError(
            f"the model has no classifier (num_classes is {num_classes}), so {source.name} has no labels"
        )
    if isinstance(source, ShardSource):
        return {str(label): label for label in range(num_classes)}
    if not source.classes:
        raise ValueError(
            f"{source.name} has no class folders; labelled use needs <class>/<image>, got images such as "
            f"{source.samples[0].key}"
        )
    if all(is_wordnet_id(name) for name in source.classes):
        subset = _imagenet_variant(num_classes)
        if subset is not None:
            return _wordnet_labels(source, subset)
    return _sorted_labels(source, num_classes)


def _imagenet_variant(num_classes: int) -> str | None:
    from timm.data import infer_imagenet_subset

    subset: str | None = infer_imagenet_subset({"num_classes": num_classes})
    return subset


def _wordnet_labels(source: ImageSource, subset: str) -> dict[str, int]:
    from timm.data import ImageNetInfo

    index = {name: label for label, name in enumerate(ImageNetInfo(subset).label_names())}
    unknown = [name for name in source.classes if name not in index]
    if unknown:
        raise ValueError(
            f"{source.name} has {len(unknown)} WordNet ids unknown to {subset} with {len(index)} classes "
            f"({', '.join(unknown[:5])}); use a model trained on these classes, or leave their folders out"
        )
    return {name: index[name] for name in source.classes}


def _sorted_labels(source: ImageSource, num_classes: int) -> dict[str, int]:
    classes = source.classes
    if len(classes) != num_classes:
        shown = ", ".join(classes[:3]) + (", ..." if len(classes) > 3 else "")
        raise ValueError(
            f"{source.name} has {len(classes)} class folders ({shown}), the model has {num_classes} classes; "
            "use the data the model was trained for, or WordNet ids as folders for an ImageNet model"
        )
    if all(name.isdecimal() for name in classes) and sorted(classes, key=int) != list(classes):
        # "10" sorts before "2": right for a model trained on ImageFolder, all wrong for label numbers.
        raise ValueError(
            f"{source.name} has class folders that are numbers without leading zeros, whose order by name "
            f"({', '.join(classes[:3])}, ...) is not their order by value; give them leading zeros (0002)"
        )
    return {name: label for label, name in enumerate(classes)}


def sample_labels(source: ImageSource, labels: Mapping[str, int]) -> Numbers:
    """The label of each image of `source`, `[images]`; raises ValueError if one has none."""
    names = source.class_names
    missing = [position for position, name in enumerate(names) if name not in labels]
    if not missing:
        return np.array([labels[name or ""] for name in names], np.int64)
    example = source.samples[missing[0]]
    if isinstance(source, ShardSource):
        raise ValueError(source.label_problem(example, labels))
    raise ValueError(
        f"{source.name} has {len(missing)} images without a label, for example {example.key}; put them "
        "into a class folder that `labels` knows, or use labels=None"
    )
