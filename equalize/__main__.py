"""``python -m equalize`` is the ``equalize`` command."""

from equalize.cli import run

if __name__ == "__main__":
    run()
