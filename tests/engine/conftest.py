"""What the tests of trainings share."""

import pytest
import toy


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Overrides of a config that name six registered scenes."""
    with toy.registered_scenes(tmp_path_factory.mktemp("scenes") / "toy", "six_scenes", train=6) as overrides:
        yield overrides
