"""`python -m fastworker`: the same as the `fastworker` command."""

from fastworker.cli import main

if __name__ == "__main__":
    main()
