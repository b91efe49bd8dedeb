"""Reading and writing files: downloads, atomic writes, checked outputs, and yaml that runs no code."""
