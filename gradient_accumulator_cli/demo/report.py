"""The report of the demonstration: tables, a few sentences and a picture."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table

from gradient_accumulator_cli.demo.data import (
    CLASSES,
    SLAB,
    TRAINING,
    VALIDATION,
    Arrays,
    Brain,
    Region,
    Settings,
    Size,
)

matplotlib.use("Agg")  # no window: the picture goes to a file

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

Results = dict[str, Arrays]  # by run: batch, microbatches, keras, reordered

# The title of each run, by its name in train.py, in the order in which they train.
TITLES = {
    "batch": "Batch",
    "microbatches": "Micro-batches",
    "keras": "Keras's own",
    "reordered": "Batch, reordered",
}
# Okabe and Ito's colours, which colour-blind people can distinguish.
COLOURS = {
    "batch": "#000000",
    "microbatches": "#0072B2",
    "keras": "#D55E00",
    "reordered": "#767676",
}
TISSUE = ListedColormap(["#000000", "#8c8c8c", "#f5f5f5"])
TRAINED, VALIDATED = "#009E73", "#CC79A7"
SIZES_OF_TEXT = {
    "font.size": 13,
    "axes.titlesize": 15,
    "axes.labelsize": 13,
    "figure.titlesize": 18,
}
LEAST = 1e-6  # percent: a smaller distance is drawn here, because 0 has no logarithm


def print_to(
    out: Console, results: dict[str, Results], settings: dict[str, Settings]
) -> None:
    """Prints a table for each model, and sentences about them."""
    brain, text = results["brain"], results["sentences"]
    out.print(table("Brain, 3D U-Net", brain, "Dice", with_memory=True))
    out.print(table("Sentences, transformer", text, "loss", with_memory=False))
    out.print(summary(results), highlight=False)
    out.print(memory(brain, settings["brain"]), highlight=False)


def table(title: str, results: Results, score: str, with_memory: bool) -> Table:
    """Returns the measurements of a model, in one row for each run."""
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    headers = ["distance from\nthe batch's weights", f"validation\n{score}"]
    if with_memory:
        headers.append("peak\nmemory")
    for header in (*headers, "time per\nupdate"):
        table.add_column(header, justify="right")
    for run, result in results.items():
        cells = [
            "-" if run == "batch" else at_the_end(results, run),
            f"{float(result['val_score']):.4f}",
        ]
        if with_memory:
            cells.append(f"{float(result['peak']):.0f} MB")
        table.add_row(TITLES[run], *cells, f"{float(result['seconds']):.2f} s")
    return table


def summary(results: dict[str, Results]) -> str:
    """Returns a sentence for each way to accumulate."""
    ours, keras_own, rounding = (
        " and ".join(at_the_end(each, run) for each in results.values())
        for run in ("microbatches", "keras", "reordered")
    )
    return (
        "Distance: the norm of the difference from the batch's weights, in percent of "
        "how far those moved.\n"
        f"Micro-batches end at {ours}. The batch in another order, which differs by "
        f"rounding only, ends at {rounding}.\n"
        f"Keras's own ends at {keras_own}: each micro-batch counts the same, however "
        "few voxels or words it has, and the sentences' schedule counts micro-batches."
    )


def memory(results: Results, settings: Settings) -> str:
    """Returns sentences about the parts of the peak memory, for the brain."""
    weights = float(results["batch"]["bytes_of_weights"]) / 1e6
    shares = {run: consists_of(results, run) for run in ("batch", "microbatches")}
    outputs, rest = (
        [share[part] for share in shares.values()] for part in ("outputs", "rest")
    )
    return (
        "Memory is the amount that training adds to libraries, data and weights "
        f"({weights:.1f} MB). Gradients and optimizer take "
        f"{shares['batch']['state']:.1f} MB, and "
        f"{shares['microbatches']['state']:.1f} MB with a sum of gradients. The "
        f"layers' outputs take {outputs[0]:.0f} MB for {settings.batch_size} patches "
        f"and {outputs[1]:.0f} for {settings.microbatch_size}. The rest is "
        f"{rest[0]:.0f} and {rest[1]:.0f} MB: other activations, their gradients, and "
        "memory that the backend takes when it first computes, however small the batch "
        "is."
    )


def consists_of(results: Results, run: str) -> dict[str, float]:
    """Returns the parts of the peak in MB: all but the rest are counted from shapes."""
    result = results[run]
    # Gradients and Adam's two moments; accumulating adds a sum of gradients.
    copies = 3 if run == "batch" else 4
    peak = float(result["peak"])
    state = min(copies * float(result["bytes_of_weights"]) / 1e6, peak)
    # A compiler may keep less than all of them.
    outputs = min(float(result["bytes_of_outputs"]) / 1e6, peak - state)
    return {"state": state, "outputs": outputs, "rest": peak - state - outputs}


def distance(results: Results, run: str) -> np.ndarray:
    """Returns the distance of a run's weights from the batch's, after each update.

    It is in percent of how far the batch's weights have moved.
    """
    batch: np.ndarray = results["batch"]["weights"].astype("float64")
    difference = np.linalg.norm(results[run]["weights"] - batch, axis=1)
    return 100 * difference[1:] / np.linalg.norm(batch[1:] - batch[0], axis=1)


def at_the_end(results: Results, run: str) -> str:
    """Returns the last distance as text, in two digits, without a power of ten."""
    return f"{Decimal(f'{distance(results, run)[-1]:.1e}'):f} %"


def draw(
    backend: str,
    brain: Brain,
    size: Size,
    results: dict[str, Results],
    settings: dict[str, Settings],
    output: Path,
) -> None:
    """Writes the picture: distances, memory, slices and learning rates."""
    with plt.rc_context(SIZES_OF_TEXT):
        figure = plt.figure(figsize=(15, 10.5), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
        figure.suptitle(
            "How far the weights are from those of training on the batch"
            f"  ({_named(backend)})"
        )
        top, bottom = figure.subfigures(2, 1, height_ratios=(1.15, 1))
        panels = top.subplots(1, 2, sharey=True)
        for axes, name, title in zip(
            panels,
            results,
            (
                f"3D U-Net, brain patches of {size.edge}³ voxels, Adam",
                "Transformer, sentences of many lengths, Adam with a schedule",
            ),
        ):
            of = "patches" if name == "brain" else "sentences"
            _draw_distances(axes, results[name])
            axes.set_title(f"{title}\n{_described(settings[name], of)}")
        panels[0].set_ylabel("% of how far the batch's weights moved")
        memory, truth, prediction, rate = bottom.subplots(
            1, 4, width_ratios=(1.35, 0.8, 0.8, 1.5)
        )
        _draw_memory(memory, results["brain"])
        slab = results["brain"]["microbatches"]["prediction"]
        _draw_slices((truth, prediction), brain, slab)
        _draw_rates(rate, results["sentences"])
        figure.savefig(output, dpi=110)
        plt.close(figure)


def _named(backend: str) -> str:
    return {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}[backend]


def _described(settings: Settings, of: str) -> str:
    epochs, batch, microbatch = settings
    return (
        f"{batch} {of} an update, micro-batches of {microbatch}, {epochs} "
        f"epoch{'s' * (epochs > 1)}"
    )


def _draw_distances(axes: Axes, results: Results) -> None:
    styles: dict[str, dict[str, Any]] = {
        "keras": {"linewidth": 3},
        "microbatches": {"linewidth": 3},
        "reordered": {"linewidth": 2, "linestyle": (0, (3, 2))},
    }
    labels = {
        "keras": "Keras's own\naccumulation",
        "microbatches": "micro-batches\n(this package)",
        "reordered": "rounding: batch\nin another order",
    }
    ends = {}
    for run, style in styles.items():
        distances = np.maximum(distance(results, run), LEAST)
        updates = np.arange(1, len(distances) + 1)
        marker = "o" if len(distances) <= 12 else None
        axes.plot(updates, distances, color=COLOURS[run], marker=marker, **style)
        ends[run] = distances[-1]
    axes.set(yscale="log", ylim=(LEAST, 3e3), xlabel="update")
    count = len(results["batch"]["learning_rate"])
    axes.set_xlim(1 - 0.02 * count, count)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_tick_params(labelleft=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e5e5")
    for run, height in _spread(ends).items():
        axes.annotate(
            f"{labels[run]}\n{at_the_end(results, run)}",
            (1.015, height),
            xycoords=axes.get_yaxis_transform(),
            color=COLOURS[run],
            weight="bold",
            va="center",
            annotation_clip=False,
        )


def _spread(heights: dict[str, float], factor: float = 50) -> dict[str, float]:
    """Returns heights on a log scale at which labels do not touch each other."""
    placed: dict[str, float] = {}
    for run, height in sorted(heights.items(), key=lambda item: -item[1]):
        above = next(reversed(placed), None)
        if above is not None and height > placed[above] / factor:
            middle = np.sqrt(height * placed[above])
            placed[above] = middle * np.sqrt(factor)
            height = middle / np.sqrt(factor)
        placed[run] = height
    return placed


def _draw_memory(axes: Axes, results: Results) -> None:
    runs = ("keras", "microbatches", "batch")  # from below
    parts = {
        "state": ("gradients and optimizer", "#000000"),
        "outputs": ("layers' outputs", "#56B4E9"),
        "rest": ("rest: temporaries, backend", "#d0d0d0"),
    }
    shares = [consists_of(results, run) for run in runs]
    left = np.zeros(len(runs))
    for part, (label, colour) in parts.items():
        widths = np.array([share[part] for share in shares])
        axes.barh(range(3), widths, left=left, color=colour, height=0.6, label=label)
        left += widths
    for y, run in enumerate(runs):
        axes.text(float(left[y]), y, f" {float(results[run]['peak']):.0f}", va="center")
    axes.set_yticks(range(3), [TITLES[run].replace(" ", "\n") for run in runs])
    axes.set(title="Peak memory of the brain's training", xlabel="MB")
    axes.set_xlim(0, 1.15 * left.max())
    axes.set_ylim(-0.5, 3.9)  # the legend is above the bars
    axes.legend(frameon=False, loc="upper right", fontsize=11.5, borderaxespad=0)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_rates(axes: Axes, results: Results) -> None:
    for run, width in (("batch", 7), ("microbatches", 2.5), ("keras", 2.5)):
        rates = results[run]["learning_rate"]
        colour = "#b5b5b5" if run == "batch" else COLOURS[run]
        axes.plot(np.arange(1, len(rates) + 1), rates, color=colour, linewidth=width)
    batch, keras_own = (results[run]["learning_rate"] for run in ("batch", "keras"))
    highest = int(np.argmax(batch))
    axes.annotate(
        "batch (grey),\nmicro-batches",
        (highest + 1 + 0.25 * len(batch), batch.max()),
        color=COLOURS["microbatches"],
        weight="bold",
        va="top",
    )
    axes.annotate(
        "Keras's own",
        (len(batch), keras_own[-1]),
        xytext=(0, -7),
        textcoords="offset points",
        color=COLOURS["keras"],
        weight="bold",
        ha="right",
        va="top",
    )
    axes.set(title="Learning rate for the sentences", xlabel="update")
    axes.set_ylim(bottom=-0.12 * batch.max())
    axes.set_yticks([0, 0.005, 0.01])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)


def _draw_slices(row: tuple[Axes, Axes], brain: Brain, prediction: np.ndarray) -> None:
    middle = prediction.shape[2] // 2
    mask = brain.mask[SLAB][:, :, middle]
    pictures = {  # the score does not count voxels outside the brain
        "Truth": brain.labels[SLAB][:, :, middle] * mask,
        "Prediction": prediction[:, :, middle] * mask,
    }
    for axes, (title, pixels) in zip(row, pictures.items()):
        axes.imshow(pixels.T, cmap=TISSUE, origin="lower", interpolation="none")
        axes.set_title(title)
        axes.set_axis_off()
        _outline(axes, TRAINING, TRAINED)
        _outline(axes, VALIDATION, VALIDATED)
    edges = {"trains": TRAINED, "validates": VALIDATED}
    legends = [
        [Patch(fill=False, edgecolor=edges[of], lw=2, label=of) for of in edges],
        [
            Patch(facecolor=TISSUE(k), edgecolor="black", label=CLASSES[k])
            for k in (1, 2)
        ],
    ]
    for axes, handles in zip(row, legends):
        axes.legend(
            handles=handles,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.01),
            frameon=False,
            fontsize=11.5,
        )


def _outline(axes: Axes, region: Region, colour: str) -> None:
    """Draws the edge of a region on a slice, whose origin is the corner of the slab."""
    x, y = (part.start - slab.start for part, slab in zip(region[:2], SLAB[:2]))
    width, height = (part.stop - part.start for part in region[:2])
    axes.add_patch(
        Rectangle((x - 0.5, y - 0.5), width, height, fill=False, edgecolor=colour, lw=2)
    )
