"""Where a test runs: on which backends, and in the core, that `make test` runs."""

import pytest
from api import keras

BACKEND = keras.backend.backend()


def core_on(*backends):
    """The mark of what is in the core on these, for it is the same on the others."""
    here = BACKEND in backends
    return pytest.mark.core if here else pytest.mark.elsewhere
