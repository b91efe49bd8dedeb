"""Running a program where only numpy, Pillow and onnxruntime can be imported, whatever else is installed."""

import subprocess
import sys

# These three, and what they need.
PACKAGES = ["numpy", "PIL", "onnxruntime", "flatbuffers", "google", "packaging"]
BLOCKER = f"""
import importlib.abc, runpy, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        first = name.partition(".")[0]
        if first not in sys.stdlib_module_names and first not in {[*PACKAGES, "postprocessing"]}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocker())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print(sorted({{name.partition(".")[0] for name in sys.modules}}), file=sys.stderr)
"""


def run(script, *argv, cwd=None):
    """Runs a script without the environment's paths and variables; returns (status, stdout, stderr).

    The last line of stderr is the list of what was imported.
    """
    command = [sys.executable, "-I", "-c", BLOCKER, str(script), *map(str, argv)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr
