"""Several processes of one training: starting them, and what they do together."""
