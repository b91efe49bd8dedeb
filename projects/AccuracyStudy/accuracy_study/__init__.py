"""Studies of accuracy: many trainings from one list, and what they show when they are compared seed by seed."""
