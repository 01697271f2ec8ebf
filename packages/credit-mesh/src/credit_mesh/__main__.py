"""``python -m credit_mesh``."""

from credit_mesh.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
