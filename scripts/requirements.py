"""Print what pyproject.toml asks for, one a line: build tools, run time, and the extras test and dev.

Lets `make` install every dependency before the project itself is built, in one resolver run. With names of
extras as arguments, print only what those ask for; `run` stands for what runs, `build` for what builds.
"""

import sys
import tomllib
from pathlib import Path

# What scikit-build-core fetches by itself, but not into an environment that it did not make.
BUILD_TOOLS = ["cmake", "ninja"]


def main(names: list[str]) -> None:
    with (Path(__file__).parent.parent / "pyproject.toml").open("rb") as file:
        pyproject = tomllib.load(file)
    build, run = pyproject["build-system"]["requires"], pyproject["project"]["dependencies"]
    known = pyproject["project"]["optional-dependencies"] | {"run": run, "build": [*build, *BUILD_TOOLS]}
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"requirements.py: no extra {unknown[0]!r} in pyproject.toml; there are {', '.join(known)}")
    wanted = [line for name in names or ["run", "test", "dev"] for line in known[name]]
    print(*([] if names else build), *wanted, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
