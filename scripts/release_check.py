"""`make release-check`: sdist and wheel into dist/, and proof that they are whole and work by themselves.

Built: the sdist, the wheel out of the sdist, and a wheel out of the checkout, which must hold the same files.
Looked at: that the sdist has every tracked file of the sources, the wheel's metadata and checksums, and that
no instruction of a newer CPU can get into the code of older ones. Then the wheel is installed with its
dependencies into a fresh environment in a temporary folder, and a random tiny model generates and serves from
there.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from packaging.metadata import Metadata

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
# What a build needs, and whoever reads the sources.
NEEDED = ("pyproject.toml", "constraints.txt", "CMakeLists.txt", "Makefile",
          "LICENSE", "README.md", "src/", "tests/")  # fmt: skip
UNWANTED = (".so", ".pyc", ".o")
MIB = 1024**2
ENGINE_FLAGS = ("--device-memory-bytes", str(64 * MIB), "--host-memory-bytes", str(64 * MIB))


class ReleaseError(Exception):
    """The release is not fit to leave."""


def main() -> int:
    began_s = time.monotonic()
    try:
        sdist, wheel = build()
        check_sdist(sdist)
        check_wheel(wheel)
        check_same_files(wheel)
        check_instruction_sets()
        # Not under the checkout: nothing of it may be found by accident.
        with tempfile.TemporaryDirectory(prefix="omniserve-release-") as folder:
            try_out(wheel, Path(folder))
    except (ReleaseError, subprocess.CalledProcessError) as error:
        print(f"release-check: FAILED: {error}", file=sys.stderr)
        return 1
    print(f"release-check: {sdist.name} and {wheel.name} are good ({time.monotonic() - began_s:.0f} s)")
    return 0


def require(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise ReleaseError(otherwise)


@contextmanager
def step(what: str) -> Iterator[list[str]]:
    """A line for each thing that was proven; what it found goes into the list."""
    began_s, found = time.monotonic(), list[str]()
    yield found
    print(f"  {what}: {', '.join(found) or 'ok'} ({time.monotonic() - began_s:.1f} s)", flush=True)


def run(command: Sequence[str | Path], cwd: Path = ROOT) -> str:
    """Standard output; ReleaseError with the end of what it said when it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=environment(), capture_output=True, text=True)
    if done.returncode:
        said = (done.stdout + done.stderr)[-4000:]
        raise ReleaseError(f"{' '.join(words)} ended with {done.returncode}:\n{said}")
    return done.stdout


def environment() -> dict[str, str]:
    """Without anything that could lead Python into the checkout or another environment."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PIP_REQUIRE_VIRTUALENV")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return kept | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}", "HF_HUB_OFFLINE": "1"}


# ---------------------------------------------------------------- what is built


def build() -> tuple[Path, Path]:
    """The sdist, and the wheel made from it, in dist/."""
    shutil.rmtree(DIST, ignore_errors=True)
    with step("sdist, and the wheel built from it") as found:
        run([sys.executable, "-m", "build", "--no-isolation", "--outdir", DIST, ROOT])
        (sdist,), (wheel,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
        found += [f"{path.name} {path.stat().st_size / MIB:.1f} MiB" for path in (sdist, wheel)]
    return sdist, wheel


def tracked(under: str = "") -> set[str]:
    names = run(["git", "ls-files", "-z", "--", under or "."]).split("\0")
    return {name for name in names if name}


def check_sdist(sdist: Path) -> None:
    with step("the sdist has every source") as found, tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
        wanted = {name for name in tracked() if name.startswith(NEEDED)}
        missing, extra = wanted - inside, {name for name in inside if name.endswith(UNWANTED)}
        require(not missing, f"{sdist.name} lacks {', '.join(sorted(missing)[:5])}")
        require(not extra, f"{sdist.name} holds build outputs: {', '.join(sorted(extra)[:5])}")
        found.append(f"{len(wanted)} files")


def check_wheel(wheel: Path) -> None:
    with step("the wheel's metadata, checksums and files") as found, zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = next(name.partition("/")[0] for name in names if ".dist-info/" in name)
        metadata = Metadata.from_email(archive.read(f"{info}/METADATA"), validate=True)
        require(metadata.description_content_type == "text/markdown", "the README's type is not said")
        require(f"{info}/licenses/LICENSE" in names, "no licence")
        _check_record(archive, f"{info}/RECORD")
        sources = {name.removeprefix("src/") for name in tracked("src")}
        wanted = {name for name in sources if not name.startswith("omniserve/csrc/")}
        native = [name for name in names if name.startswith("omniserve/_native") and name.endswith(".so")]
        require(not wanted - names, f"{wheel.name} lacks {', '.join(sorted(wanted - names)[:5])}")
        require(len(native) == 1, f"{wheel.name} holds {len(native)} native modules")
        extra = {name for name in names if not name.startswith(info)} - wanted - set(native)
        require(not extra, f"{wheel.name} also holds {', '.join(sorted(extra)[:5])}")
        found += [f"{metadata.name} {metadata.version}", f"{len(names)} files"]


def _check_record(archive: zipfile.ZipFile, record: str) -> None:
    listed = [line.rsplit(",", 2) for line in archive.read(record).decode().splitlines()]
    names = {name for name, _, _ in listed}
    require(names == set(archive.namelist()), "RECORD names other files than there are")
    for name, digest, size in listed:
        if name == record:
            continue
        data = archive.read(name)
        made = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        require((digest, size) == (f"sha256={made}", str(len(data))), f"RECORD is wrong about {name}")


def check_same_files(wheel: Path) -> None:
    with step("a wheel out of the checkout holds the same files"), tempfile.TemporaryDirectory() as folder:
        run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, ROOT])
        (other,) = Path(folder).glob("*.whl")
        require(other.name == wheel.name, f"{other.name} from the checkout, {wheel.name} from the sdist")
        lists = [set(zipfile.ZipFile(path).namelist()) for path in (wheel, other)]
        difference = sorted(lists[0] ^ lists[1])
        require(not difference, f"only in one of the two wheels: {', '.join(difference[:5])}")


def check_instruction_sets() -> None:
    """Files for newer CPUs must define nothing that the linker may take for another file's copy of the same
    function: it would then run on CPUs that do not have its instructions."""
    if platform.machine() != "x86_64":
        return
    with step("no code for newer CPUs outside of what is chosen at run time") as found:
        objects = list((ROOT / "build").glob("cp*/CMakeFiles/omniserve_core.dir/**/*_avx*.o"))
        require(bool(objects), "no object files of the wheel's build in build/")
        for path in objects:
            weak = [line for line in run(["nm", "-C", path]).splitlines() if line[17:18] in "WVwvu"]
            weak = [line for line in weak if not line.startswith(" ")]  # undefined ones take nothing's place
            require(not weak, f"{path.name} defines what others may define too: {weak[:2]}")
        flags = (ROOT / "CMakeLists.txt").read_text()
        require("-march" not in flags and "-mtune" not in flags, "CMakeLists.txt names a CPU for all files")
        found.append(f"{len(objects)} files")


# ---------------------------------------------------------------- what works


def try_out(wheel: Path, folder: Path) -> None:
    """The wheel in an environment of its own, with a model that needs no network."""
    with step("installed into a fresh environment"):
        run([sys.executable, "-m", "venv", folder / "venv"])
        python = folder / "venv" / "bin" / "python"
        run([python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel], cwd=folder)
        run([python, "-m", "pip", "check"], cwd=folder)
    program = folder / "venv" / "bin" / "omniserve"
    with step("omniserve --version") as found:
        found.append(run([program, "--version"], cwd=folder).strip())
        where = run([python, "-c", "import omniserve._native as n; print(n.__file__)"], cwd=folder).strip()
        require(Path(where).is_relative_to(folder / "venv"), f"omniserve comes from {where}")
        found.append(Path(where).relative_to(folder / "venv").as_posix())
    model = make_model(folder)
    with step("a chat and a lane generate") as found:
        for service_class in ("latency_sensitive", "best_effort"):
            asked = ["--max-tokens", "8", "--ignore-eos", "--json", "--service-class", service_class, "Hello"]
            flags = [*ENGINE_FLAGS, "--host-offload", "always", "--model", model]
            answer = json.loads(run([program, "generate", *flags, *asked], cwd=folder))
            require(len(answer["token_ids"]) == 8, f"{service_class}: {answer}")
            found.append(f"{len(answer['token_ids'])} tokens")
    serve(program, model)


def make_model(folder: Path) -> Path:
    """The tests' random Llama with its byte tokenizer."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import TINY_CONFIG, write_tiny_llama

    model = folder / "tiny"
    model.mkdir()
    write_tiny_llama(model, 0, TINY_CONFIG)
    return model


def serve(program: Path, model: Path) -> None:
    """A server from the wheel answers, and ends by SIGTERM with 0."""
    from server.processes import Served  # of tests/, as above

    os.chdir(model.parent)
    state = str(model.parent / "state")
    flags = (str(model), "--served-model-name", "tiny", "--state-dir", state, *ENGINE_FLAGS)
    with step("omniserve serve") as found:
        server = Served(*flags, env=environment(), program=(str(program),))
        try:
            server.wait_ready()
            asked = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "ignore_eos": True}
            for tier in ("default", "flex"):
                answer = server.post("/v1/chat/completions", asked | {"service_tier": tier})
                require(answer.status_code == 200, f"{tier}: {answer.status_code} {answer.text}")
                found.append(f"{tier}: {answer.json()['usage']['completion_tokens']} tokens")
            server.process.send_signal(signal.SIGTERM)
            status = server.wait_ended()
            require(status == 0, f"the server ended with {status}:\n{server.log}")
            found.append("SIGTERM: 0")
        finally:
            server.close()
    with step("omniserve state check") as found:
        found.append(run([program, "state", "check", "--state-dir", state]).strip().partition(": ")[2])


if __name__ == "__main__":
    sys.exit(main())
