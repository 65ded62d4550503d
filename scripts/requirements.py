"""Print what pyproject.toml asks for, one a line: build tools, run time, and the extras test and dev.

Lets `make` install every dependency before the project itself is built, in one resolver run.
"""

import tomllib
from pathlib import Path


def main() -> None:
    with (Path(__file__).parent.parent / "pyproject.toml").open("rb") as file:
        pyproject = tomllib.load(file)
    extras = pyproject["project"]["optional-dependencies"]
    print(
        *pyproject["build-system"]["requires"],
        *pyproject["project"]["dependencies"],
        *extras["test"],
        *extras["dev"],
        sep="\n",
    )


if __name__ == "__main__":
    main()
