"""What dev/gpu_check.py runs, one part of it a file."""
