"""Reading and writing files: downloads, whole writes, and yaml that runs no code."""
