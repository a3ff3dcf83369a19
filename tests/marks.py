"""What is in the core of the tests, and where: `make test` runs these alone."""

import pytest
from api import keras


def core_on(*backends):
    """The mark of what is in the core on these, for it is the same on the others."""
    here = keras.backend.backend() in backends
    return pytest.mark.core if here else pytest.mark.elsewhere
