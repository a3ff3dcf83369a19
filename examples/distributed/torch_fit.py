"""`fit` in the processes of `torchrun`. See README.md for how to start it."""

import argparse
import os

os.environ["KERAS_BACKEND"] = "torch"

import digits
import keras
import torch
import torch.distributed as dist

from gradient_accumulator import accumulate


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--backup", help="folder to continue from after a failure")
    arguments = parser.parse_args()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, count = dist.get_rank(), dist.get_world_size()

    training, validation = digits.data()
    # Each process cuts its share of a batch into micro-batches of 4.
    model = accumulate(digits.classifier(), microbatch_size=4)
    x, y = (digits.share(array, count, rank) for array in training)
    callbacks = []
    if arguments.backup:
        callbacks.append(keras.callbacks.BackupAndRestore(f"{arguments.backup}/{rank}"))
    model.fit(
        x,
        y,
        batch_size=digits.BATCH // count,
        epochs=arguments.epochs,
        callbacks=callbacks,
        verbose=2 if rank == 0 else 0,
    )
    digits.report(model, validation)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
