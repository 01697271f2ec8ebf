"""Models to train and to copy from, written for one rank."""
