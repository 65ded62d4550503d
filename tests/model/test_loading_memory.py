"""Loading needs the weights, one merged tensor and one piece of what is read; never the checkpoint twice.

What counts is anonymous resident memory, looked at around every read and every packing, and every 2 ms.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

TinyLlama = Callable[..., Path]
SIZES: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 2,
    "vocab_size": 16_384,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}
# The embedding is the largest tensor; a piece is what loading reads at once (loading._PIECE_BYTES). Besides,
# threads and allocators want some memory that has nothing to do with the size of the model.
LARGEST = 16_384 * 1024 * 4
PIECE = 32 << 20
OVERHEAD = 48 << 20

LOADER = """
import sys, threading
from pathlib import Path
import torch
from omniserve.model import checkpoint, linear, loading

def anonymous():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024

peak = 0
def look(*_):
    global peak
    peak = max(peak, anonymous())

def watched(function):
    def call(*arguments):
        look()
        result = function(*arguments)
        look()
        return result
    return call

def sample(stop):
    while not stop.wait(0.002):
        look()

torch.set_num_threads(1)
quantization = sys.argv[3]
# A small one first: libraries take their own memory.
loading.load_decoder(Path(sys.argv[2]), quantization=quantization)
for name in ("make_linear", "make_gated", "Int4Linear.__init__"):
    owner, _, method = name.rpartition(".")
    owner = getattr(loading, owner) if owner else loading
    setattr(owner, method, watched(getattr(owner, method)))
checkpoint._Slice.read = watched(checkpoint._Slice.read)
before, stop = anonymous(), threading.Event()
sampler = threading.Thread(target=sample, args=(stop,))
sampler.start()
decoder = loading.load_decoder(Path(sys.argv[1]), quantization=quantization)
stop.set()
sampler.join()
print(decoder.weight_bytes, peak - before, anonymous() - before)
"""


@pytest.fixture(scope="module")
def large(tiny_llama: TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quarter of a gigabyte of float32 in four files."""
    whole = tiny_llama(**SIZES)
    folder = tmp_path_factory.mktemp("sharded")
    weight_map: dict[str, str] = {}
    with safe_open(whole / "model.safetensors", framework="pt") as tensors:
        names = sorted(tensors.keys())
        for number in range(4):
            part = names[number::4]
            save_file({name: tensors.get_tensor(name) for name in part}, folder / f"{number}.safetensors")
            weight_map |= dict.fromkeys(part, f"{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text((whole / "config.json").read_text())
    return folder


@pytest.mark.slow
def test_loading_takes_the_weights_and_about_one_merged_tensor(large: Path, tiny_llama: TinyLlama) -> None:
    num_bytes, peak, after = loaded(large, tiny_llama(), "none")
    assert num_bytes == sum(size for _, size in tensor_bytes(large))
    assert peak >= after >= num_bytes  # it sees the weights
    print(f"peak {(peak - num_bytes) / 2**20:.0f} MiB above the weights; largest tensor {LARGEST >> 20} MiB")
    assert peak <= num_bytes + LARGEST + PIECE + OVERHEAD, (peak - num_bytes) / 2**20


@pytest.mark.slow
@pytest.mark.parametrize(("quantization", "bits"), [("int8", 8), ("int4", 5)])
def test_rounded_weights_are_never_in_memory_unrounded_all_at_once(
    large: Path, tiny_llama: TinyLlama, quantization: str, bits: int
) -> None:
    num_bytes, peak, after = loaded(large, tiny_llama(), quantization)
    sizes = dict(tensor_bytes(large))
    embedding, head = sizes.pop("model.embed_tokens.weight"), sizes.pop("lm_head.weight")
    expected = embedding + head // 4 + sum(sizes.values()) * bits // 32
    assert num_bytes == pytest.approx(expected, rel=0.01)
    assert peak >= after >= num_bytes
    above = (peak - num_bytes) / 2**20
    print(f"{quantization}: peak {above:.0f} MiB above {num_bytes / 2**20:.0f} MiB of weights")
    # The largest tensor in float32 and, while torch packs it, once more in int32.
    assert peak <= num_bytes + 2 * LARGEST + PIECE + OVERHEAD


def loaded(large: Path, small: Path, quantization: str) -> tuple[int, int, int]:
    """Bytes of the weights, and resident: at the peak of loading and after it."""
    command = [sys.executable, "-c", LOADER, str(large), str(small), quantization]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    num_bytes, peak, after = map(int, done.stdout.split())
    return num_bytes, peak, after


def tensor_bytes(folder: Path) -> list[tuple[str, int]]:
    found = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            found += [(name, tensors.get_tensor(name).nbytes) for name in tensors.keys()]  # noqa: SIM118
    return found


def test_a_tensor_is_read_in_pieces(tiny_llama: TinyLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    from model.reference import decoder_logits
    from omniserve.model import checkpoint, loading

    expected = decoder_logits(loading.load_decoder(tiny_llama()), [1, 2, 3])
    largest = 0
    read = checkpoint._Slice.read

    def watched(self: checkpoint._Slice, rows: slice, columns: slice) -> torch.Tensor:
        nonlocal largest
        piece = read(self, rows, columns)
        largest = max(largest, piece.nbytes)
        return piece

    monkeypatch.setattr(checkpoint._Slice, "read", watched)
    monkeypatch.setattr(loading, "_PIECE_BYTES", 4096)
    assert torch.equal(decoder_logits(loading.load_decoder(tiny_llama()), [1, 2, 3]), expected)
    assert largest == 4096
