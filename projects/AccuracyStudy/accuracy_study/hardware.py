"""The name of the machine's processor."""

import platform


def cpu_name() -> str:
    """Return the processor's name, as Linux has it, or the architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
