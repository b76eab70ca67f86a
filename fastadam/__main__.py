"""What ``fastadam`` and ``python -m fastadam`` run."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or exit with code 1 and the remedy where its packages are missing."""
    try:
        from fastadam.cli import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"rich", "typer"}:
            raise
        sys.exit('ImportError: the fastadam command needs rich and typer. pip install "fastadam[cli]"')
    app(prog_name="fastadam")


if __name__ == "__main__":
    main()
