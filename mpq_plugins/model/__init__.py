"""A torch model: its layers, how they are found, how it is run."""
