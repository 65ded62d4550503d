"""Print what pyproject.toml asks for, one a line: build tools, run time, and the extras test and dev.

Lets `make` install every dependency before the project itself is built, in one resolver run. With names of
extras as arguments, print only what those ask for.
"""

import sys
import tomllib
from pathlib import Path


def main(extras: list[str]) -> None:
    with (Path(__file__).parent.parent / "pyproject.toml").open("rb") as file:
        pyproject = tomllib.load(file)
    base = [] if extras else [*pyproject["build-system"]["requires"], *pyproject["project"]["dependencies"]]
    known = pyproject["project"]["optional-dependencies"]
    unknown = [name for name in extras if name not in known]
    if unknown:
        sys.exit(f"requirements.py: no extra {unknown[0]!r} in pyproject.toml; there are {', '.join(known)}")
    print(*base, *(line for name in extras or ["test", "dev"] for line in known[name]), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
