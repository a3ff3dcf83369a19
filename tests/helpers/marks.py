"""Where a test runs: on which backends, and whether in the core (`make test`)."""

import pytest
from api import keras

BACKEND = keras.backend.backend()


def core_on(*backends):
    """The mark of a test that is in the core on these backends only.

    The other backends run the same code in it.
    """
    here = BACKEND in backends
    return pytest.mark.core if here else pytest.mark.elsewhere
