"""The MNI152 brain that nilearn ships, cut into patches for training and validation.

The template is symmetric: its right hemisphere is the mirror image of its left one. If
a network trained on the whole left hemisphere, validation on the right one would show
it the same tissue again. Therefore training uses the front of the left hemisphere, and
validation uses the back of the right one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Region = tuple[slice, slice, slice]
Arrays = dict[str, np.ndarray]

CLASSES = ("background", "grey matter", "white matter")

# The brain's bounding box in voxels of 2 mm, halved left | right and back | front.
TRAINING: Region = (slice(10, 49), slice(60, 106), slice(0, 80))
VALIDATION: Region = (slice(50, 89), slice(12, 58), slice(0, 80))

# A slab around the slice in the picture, as thick as the network's receptive field.
SLAB: Region = (slice(10, 90), slice(12, 108), slice(22, 54))


@dataclass(frozen=True)
class Size:
    """The size of the demonstration on the brain."""

    edge: int  # the number of voxels along a patch's edge
    patches: int  # the number of patches in an epoch
    validation_patches: int
    batch_size: int  # the number of patches of one update
    microbatch_size: int  # the number of patches on the device at one time
    epochs: int


class Settings(NamedTuple):
    """The numbers by which a model is trained."""

    epochs: int
    batch_size: int
    microbatch_size: int


SIZES = {
    "full": Size(
        edge=32,
        patches=64,
        validation_patches=16,
        batch_size=16,
        microbatch_size=2,
        epochs=6,
    ),
    "small": Size(
        edge=16,
        patches=32,
        validation_patches=8,
        batch_size=16,
        microbatch_size=2,
        epochs=2,
    ),
}


@dataclass(frozen=True)
class Brain:
    """The image of a head, the class of each voxel, and a mask of the brain."""

    image: np.ndarray  # float32, mean 0 and deviation 1 in the brain, 0 outside
    labels: np.ndarray  # int32, an index in CLASSES
    mask: np.ndarray  # bool


def load_brain() -> Brain:
    """Loads the T1 image and its tissue maps, which the nilearn package contains."""
    from nilearn import datasets

    t1, grey, white, mask = (
        _voxels(load(resolution=2))
        for load in (
            datasets.load_mni152_template,
            datasets.load_mni152_gm_template,
            datasets.load_mni152_wm_template,
            datasets.load_mni152_brain_mask,
        )
    )
    mask = mask > 0
    labels = np.argmax(np.stack([1 - grey - white, grey, white]), axis=0)
    image = np.where(mask, (t1 - t1[mask].mean()) / t1[mask].std(), 0)
    return Brain(image.astype("float32"), labels.astype("int32"), mask)


def prepare(brain: Brain, size: Size, seed: int = 0) -> Arrays:
    """Returns the named arrays that a training run reads."""
    rng = np.random.default_rng(seed)
    training = draw_patches(brain, TRAINING, size.edge, size.patches, rng)
    validation = draw_patches(
        brain, VALIDATION, size.edge, size.validation_patches, rng
    )
    return {
        **{f"train_{name}": array for name, array in training.items()},
        **{f"val_{name}": array for name, array in validation.items()},
        "slab": brain.image[SLAB][None, ..., None],
    }


def draw_patches(
    brain: Brain, region: Region, edge: int, count: int, rng: np.random.Generator
) -> Arrays:
    """Draws cubes that lie in `region` and contain some brain.

    Voxels outside the brain have the weight 0. Their number differs from patch to
    patch, so that micro-batches of equally many patches have different weights.
    """
    patches: list[Region] = []
    while len(patches) < count:
        corner = [rng.integers(s.start, s.stop - edge + 1) for s in region]
        x, y, z = (slice(start, start + edge) for start in corner)
        if brain.mask[x, y, z].mean() > 0.05:
            patches.append((x, y, z))
    return {
        "x": np.stack([brain.image[patch][..., None] for patch in patches]),
        "y": np.stack([brain.labels[patch] for patch in patches]),
        "weight": np.stack([brain.mask[patch] for patch in patches]).astype("float32"),
    }


def save(arrays: Arrays, path: Path) -> None:
    """Writes named arrays to an .npz file."""
    np.savez(path, **arrays)  # type: ignore[arg-type]


def load(path: Path) -> Arrays:
    """Reads back what `save` wrote."""
    with np.load(path) as file:
        return dict(file)


def _voxels(image: Any) -> np.ndarray:
    return np.asarray(image.get_fdata(), dtype="float32")
