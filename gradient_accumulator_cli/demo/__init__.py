"""The demonstration: a brain and sentences, in batches and in micro-batches."""
