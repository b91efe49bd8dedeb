import pytest
import toy
from toy import RCNN, RETINANET


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    return {base: toy.save_teacher(folder / f"{i}.pth", base) for i, base in enumerate((RETINANET, RCNN))}


@pytest.fixture
def cfg(teachers):
    return toy.distilled_config(teachers[RETINANET])
