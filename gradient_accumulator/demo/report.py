"""What the demonstration shows: a table, a sentence and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from rich.table import Table

from gradient_accumulator.demo.data import (
    CLASSES,
    SLAB,
    TRAINING,
    VALIDATION,
    Arrays,
    Brain,
    Region,
)

matplotlib.use("Agg")  # no window: the picture goes to a file

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch, Rectangle

# Full batch, in pieces, Keras's own; readable without telling red from green.
COLOURS = ("#9ecae1", "#08519c", "#e6550d")
TISSUE = ListedColormap(["#000000", "#8c8c8c", "#f5f5f5"])
TRAINED, VALIDATED = "#00b894", "#e84393"

Results = dict[str, Arrays]  # by title: the full batch, in pieces, Keras's own


def table(results: Results) -> Table:
    """The measurements, a row for each run."""
    table = Table()
    table.add_column("", no_wrap=True)
    for header in (
        "largest weight\ndifference",
        "of the\nmove",
        "validation\nDice",
        "peak\nmemory",
        "time per\nupdate",
    ):
        table.add_column(header, justify="right")
    for title, result in results.items():
        is_reference = result is _full(results)
        table.add_row(
            title,
            "-" if is_reference else f"{difference(results, title):.1e}",
            "-" if is_reference else f"{share_of_move(results, title):.2g} %",
            f"{float(result['val_dice']):.4f}",
            f"{float(result['peak']):.0f} MB",
            f"{float(result['seconds']):.2f} s",
        )
    return table


def summary(results: Results) -> str:
    """What the table says, in a sentence for each way to accumulate."""
    _, pieces, keras_own = results
    return (
        f"{pieces}: the full batch's weights, to "
        f"{share_of_move(results, pieces):.2g} % "
        "of how far they moved.\n"
        f"{keras_own}: {share_of_move(results, keras_own):.2g} % away, for each piece "
        "counts the same, however few brain voxels it holds."
    )


def difference(results: Results, title: str) -> float:
    """The largest difference of any weight from the full batch's."""
    return float(np.abs(results[title]["weights"] - _full(results)["weights"]).max())


def share_of_move(results: Results, title: str) -> float:
    """The same, in percent of the largest way that a weight went in training."""
    return 100 * difference(results, title) / float(_full(results)["moved"])


def draw(brain: Brain, results: Results, output: Path) -> None:
    """Writes the picture: losses, differences and memory, and a slice of the brain."""
    figure, axes = plt.subplots(2, 3, figsize=(12.5, 8.4), layout="constrained")
    _draw_losses(axes[0, 0], results)
    _draw_differences(axes[0, 1], results)
    _draw_memory(axes[0, 2], results)
    _draw_slice(axes[1], brain, list(results.values())[1]["prediction"])
    figure.savefig(output, dpi=130)
    plt.close(figure)


def _draw_losses(axes: Axes, results: Results) -> None:
    styles: tuple[dict[str, Any], ...] = (
        {"linewidth": 6, "solid_capstyle": "round"},  # shows under the thin one
        {"linewidth": 1.8, "zorder": 4},
        {"linewidth": 1.8},
    )
    for (title, result), colour, style in zip(results.items(), COLOURS, styles):
        epochs = np.arange(1, len(result["loss"]) + 1)
        axes.plot(epochs, result["loss"], color=colour, label=title, **style)
        style = {**style, "linestyle": (0, (1, 2)), "dash_capstyle": "round"}
        axes.plot(epochs, result["val_loss"], color=colour, **style)
    axes.plot([], [], color="black", linewidth=1.8, label="training")
    axes.plot([], [], color="black", linewidth=1.8, linestyle=":", label="validation")
    axes.set(title="Loss", xlabel="epoch", xticks=epochs)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_differences(axes: Axes, results: Results) -> None:
    titles = list(results)[1:]
    shares = [share_of_move(results, title) for title in titles]
    bars = axes.bar(titles, np.maximum(shares, 1e-6), color=COLOURS[1:], width=0.6)
    axes.bar_label(bars, [f"{share:.2g} %" for share in shares], padding=3)
    axes.set(title="Weight difference from the full batch", yscale="log")
    axes.set(ylim=(1e-4, 1e3), ylabel="% of the largest move in training")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_memory(axes: Axes, results: Results) -> None:
    peaks = [float(result["peak"]) for result in results.values()]
    bars = axes.bar(list(results), peaks, color=COLOURS, width=0.6)
    axes.bar_label(bars, [f"{peak:.0f}" for peak in peaks], padding=3)
    axes.set(title="Peak memory of training", ylabel="MB")
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_slice(row: Sequence[Axes], brain: Brain, prediction: np.ndarray) -> None:
    middle = prediction.shape[2] // 2
    mask = brain.mask[SLAB][:, :, middle]
    # Tissue is not judged outside the brain.
    pictures = {
        "T1 image": np.where(mask, brain.image[SLAB][:, :, middle], brain.image.min()),
        "Truth": brain.labels[SLAB][:, :, middle] * mask,
        "Prediction, trained in pieces": prediction[:, :, middle] * mask,
    }
    for axes, (title, pixels) in zip(row, pictures.items()):
        colours = "gray" if axes is row[0] else TISSUE
        axes.imshow(pixels.T, cmap=colours, origin="lower", interpolation="none")
        axes.set_title(title)
        axes.set_axis_off()
        _outline(axes, TRAINING, TRAINED)
        _outline(axes, VALIDATION, VALIDATED)
    row[0].legend(
        handles=[
            Patch(fill=False, edgecolor=TRAINED, label="trains"),
            Patch(fill=False, edgecolor=VALIDATED, label="validates"),
        ],
        loc="lower center",
        bbox_to_anchor=(0.5, -0.09),
        ncols=2,
        frameon=False,
    )
    row[2].legend(
        handles=[
            Patch(facecolor=TISSUE(k), edgecolor="black", label=CLASSES[k])
            for k in (1, 2)
        ],
        loc="lower center",
        bbox_to_anchor=(0.5, -0.09),
        ncols=2,
        frameon=False,
    )


def _outline(axes: Axes, region: Region, colour: str) -> None:
    """Draws the region's edge onto the slice, whose origin is the slab's corner."""
    x, y = (part.start - slab.start for part, slab in zip(region[:2], SLAB[:2]))
    width, height = (part.stop - part.start for part in region[:2])
    axes.add_patch(
        Rectangle((x - 0.5, y - 0.5), width, height, fill=False, edgecolor=colour, lw=2)
    )


def _full(results: Results) -> Arrays:
    return next(iter(results.values()))
