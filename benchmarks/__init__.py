"""What the packages cost; run by `nox -s bench`, one file for each benchmark."""
