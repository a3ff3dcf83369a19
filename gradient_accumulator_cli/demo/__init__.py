"""The demonstration: on a real brain and on sentences, the batch and micro-batches."""
