"""The order of work in two CUDA streams, by fakes that write down what is asked of them."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from mgd_det.distillation import side_stream


class FakeStream:
    def __init__(self, log, name):
        self._log, self.name = log, name

    def wait_stream(self, other):
        self._log.append(f"{self.name} waits for {other.name}")


class FakeTensor:
    device = SimpleNamespace(type="cuda", index=0)

    def __init__(self, log, name):
        self._log, self._name = log, name

    def record_stream(self, stream):
        self._log.append(f"{self._name} is used in {stream.name}")


@pytest.fixture
def log(monkeypatch):
    log = []
    current, side = [FakeStream(log, "main")], FakeStream(log, "side")

    @contextmanager
    def within(stream):
        before, current[0] = current[0], stream
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(side_stream, "_side_stream", lambda device: side)
    return SimpleNamespace(lines=log, current=lambda: current[0].name)


def test_the_side_stream_waits_for_the_images_and_the_main_one_for_the_result(log):
    images, feature = FakeTensor(log.lines, "images"), FakeTensor(log.lines, "res2")
    output = FakeTensor(log.lines, "p3")

    def teacher(x):
        assert x is images
        log.lines.append(f"the teacher in {log.current()}")
        return {"res2": feature}, {"p3": output}

    join = side_stream.queue_beside(teacher, images)
    log.lines.append(f"the student in {log.current()}")
    features, outputs = join()
    log.lines.append("the loss")
    assert features == {"res2": feature} and outputs == {"p3": output}
    assert log.lines == [
        "side waits for main",
        "the teacher in side",
        "images is used in side",
        "the student in main",
        "main waits for side",
        "res2 is used in main",
        "p3 is used in main",
        "the loss",
    ]


def test_on_the_cpu_it_just_runs():
    join = side_stream.queue_beside(lambda x: ({"res2": x + 1}, {}), torch.zeros(2))
    assert torch.equal(join()[0]["res2"], torch.ones(2))
