import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real data sets, named by MOEFY_DATA."""
    return Path(os.environ["MOEFY_DATA"])
