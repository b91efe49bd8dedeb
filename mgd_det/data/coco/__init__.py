"""Data sets in COCO's format: register them, check them, and leave out what is broken."""
