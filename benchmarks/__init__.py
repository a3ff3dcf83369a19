"""Speed, memory and exactness against Keras: `python -m benchmarks --help`."""
