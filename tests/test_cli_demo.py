"""The demonstration: what it records of a training, and how it shows that."""

import numpy as np
import pytest
from helpers import core_on

from gradient_accumulator_cli.demo import sentences, train
from gradient_accumulator_cli.demo.data import SLAB, Brain, Settings, Size, save

pytestmark = core_on("torch")

SIZE = sentences.Size(
    sentences=16, validation_sentences=4, batch_size=8, microbatch_size=2, epochs=2
)
UPDATES = 4
RUNS = ("batch", "microbatches", "keras", "reordered")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    save(sentences.prepare(SIZE), folder / "sentences.npz")
    settings = (SIZE.epochs, SIZE.batch_size, SIZE.microbatch_size)
    return {run: train.train("sentences", folder, run, *settings) for run in RUNS}


@pytest.fixture
def report():
    for package in ("matplotlib", "rich"):
        pytest.importorskip(package)
    from gradient_accumulator_cli.demo import report

    return report


@pytest.mark.parametrize("run", RUNS)
def test_weights_are_written_down_once_an_update(run, results):
    weights = results[run]["weights"]
    assert len(weights) == UPDATES + 1
    assert len(results[run]["learning_rate"]) == UPDATES
    np.testing.assert_array_equal(weights[0], results["batch"]["weights"][0])
    assert (weights[1:] != weights[:-1]).any(axis=1).all()


def test_distances(results, report):
    """After each update, micro-batches and batch differ only by rounding."""
    assert report.distance(results, "microbatches").shape == (UPDATES,)
    assert report.distance(results, "microbatches").max() < 0.1
    assert report.distance(results, "reordered").max() < 0.1
    assert report.distance(results, "reordered").min() > 0
    assert report.distance(results, "keras").min() > 10


@pytest.mark.parametrize(
    "apart, shown",
    [(4.96e-7, "0.000050"), (3.9e-7, "0.000039"), (0.0723, "7.2"), (2.143, "210")],
)
def test_distances_are_shown_in_two_digits(apart, shown, report):
    """Then a longer number in a column is a larger one."""
    batch = {"weights": np.array([[0.0], [1.0]])}
    other = {"weights": batch["weights"] * (1 + apart)}
    assert report.at_the_end({"batch": batch, "keras": other}, "keras") == f"{shown} %"


def test_schedules_count_updates(results):
    rates = {run: result["learning_rate"] for run, result in results.items()}
    np.testing.assert_allclose(rates["microbatches"], rates["batch"], rtol=1e-6)
    assert not np.allclose(rates["keras"], rates["batch"], rtol=0.1)


def test_reordered_batches_have_the_same_examples():
    data = {"train_x": np.arange(10), "val_x": np.arange(4)}
    shuffled = train.reordered(data, 4)
    for start in (0, 4, 8):
        batch = shuffled["train_x"][start : start + 4]
        assert {*batch} == {*data["train_x"][start : start + 4]}
    assert (shuffled["train_x"] != data["train_x"]).any()
    np.testing.assert_array_equal(shuffled["val_x"], data["val_x"])


def test_layers_outputs_are_counted():
    model = train.MODELS["brain"](None, 1)
    assert train.bytes_of(train.outputs(model, (2, 8, 8, 8, 1))) == 2 * (
        # The layers of each level: convolutions, pooling or growing, and joining.
        4 * 8**3 * (4 * 8 + 3 + 16 + 24)
        + 4 * 4**3 * (4 * 16 + 8 + 32 + 48)
        + 4 * 2**3 * (2 * 32 + 16)
    )


def test_memory_is_shown_as_measured_and_in_parts(results, report):
    brain = with_outputs(results)
    for run in ("batch", "microbatches", "keras"):
        parts = report.consists_of(brain, run)
        assert sum(parts.values()) == pytest.approx(50)
        assert min(parts.values()) >= 0
    told = report.memory(brain, Settings(2, 8, 2))
    assert "20 MB for 8 patches and 5 for 2" in told


@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_the_picture(backend, results, report, tmp_path):
    shape = tuple(part.stop for part in SLAB)
    voxels = np.zeros(shape, "int32")
    brain = Brain(voxels.astype("float32"), voxels, voxels == 0)
    report.draw(
        backend,
        brain,
        Size(16, 4, 4, 8, 2, 2),
        {"brain": with_outputs(results), "sentences": results},
        {"brain": Settings(2, 8, 2), "sentences": Settings(2, 8, 2)},
        tmp_path / "picture.svg",
    )
    assert (tmp_path / "picture.svg").stat().st_size > 10_000


def with_outputs(results):
    """Results like those of the brain, with a peak memory of 50 MB."""
    slab = np.zeros([part.stop - part.start for part in SLAB], "int32")
    return {
        run: {
            **result,
            "peak": np.array(50.0),
            "bytes_of_outputs": np.array(5e6 if run == "microbatches" else 2e7),
            "prediction": slab,
        }
        for run, result in results.items()
    }
