"""What the start of a training does not wait for."""

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_a_training_starts_without_what_only_its_report_needs():
    code = (
        "import sys; import mgd_det.engine, mgd_det.cli.train_net, mgd_det.cli.lazyconfig_train_net; "
        "import mgd_det.visualization.report; "
        "print(sorted({'matplotlib', 'jinja2', 'mgd_det'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['mgd_det']"
