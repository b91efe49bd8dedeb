"""What the programs of ``tools/`` call: arguments, set-up and the reporting of errors."""
