"""A checkpoint is loaded whole or refused with the names of what is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.reference import decoder_logits
from omniserve.errors import ModelError
from omniserve.model import loading
from omniserve.model.loading import ensure_model, load_decoder

TinyLlama = Callable[..., Path]
PROMPT = list(range(20))


@pytest.fixture
def folder(tiny_llama: TinyLlama, tmp_path: Path) -> Path:
    """A tiny model that the test may change."""
    return Path(shutil.copytree(tiny_llama(), tmp_path / "model"))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_missing_tensor_is_named(folder: Path) -> None:
    rewrite(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"1 missing tensor: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_decoder(folder)


def test_many_missing_tensors_are_counted_and_some_named(folder: Path) -> None:
    def drop_layer(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "layers.1." in name]:
            del tensors[name]

    rewrite(folder, drop_layer)
    with pytest.raises(ModelError, match=r"9 missing tensors: .* and 4 more"):
        load_decoder(folder)


def test_an_unexpected_tensor_is_named(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(4)}))
    with pytest.raises(ModelError, match=r"unexpected tensor: model\.layers\.0\.self_attn\.q_norm\.weight"):
        load_decoder(folder)


def test_a_tensor_of_another_shape_is_named(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"model.norm.weight": torch.ones(4)}))
    with pytest.raises(ModelError, match=r"model\.norm\.weight has shape \(4,\), config\.json says \(128,\)"):
        load_decoder(folder)


def test_rotary_buffers_of_old_checkpoints_are_ignored(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    load_decoder(folder)


def test_a_tied_checkpoint_may_hold_its_head_twice(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama(tie_word_embeddings=True), tmp_path / "model"))
    expected = decoder_logits(load_decoder(folder), PROMPT)
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert torch.equal(decoder_logits(load_decoder(folder), PROMPT), expected)


def test_several_files_with_an_index_equal_one_file(folder: Path) -> None:
    expected = decoder_logits(load_decoder(folder), PROMPT)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(decoder_logits(load_decoder(folder), PROMPT), expected)


@pytest.mark.parametrize("content", ["", "{}", "[]"])
def test_a_broken_index_is_an_error(folder: Path, content: str) -> None:
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match="not a safetensors index"):
        load_decoder(folder)


def test_absent_or_cut_weights_are_an_error(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="weights cannot be read"):
        load_decoder(folder)
    weights.unlink()
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
        load_decoder(folder)


def test_weights_of_another_dtype_are_converted(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({name: tensor.bfloat16() for name, tensor in t.items()}))
    wide = decoder_logits(load_decoder(folder, torch.float32), PROMPT)
    narrow = load_decoder(folder, torch.bfloat16)
    assert narrow.embed(torch.tensor([1])).dtype == torch.bfloat16
    assert (decoder_logits(narrow, PROMPT) - wide).abs().mean() < 0.1 * wide.abs().mean()


def test_weight_bytes_count_what_is_kept(tiny_llama: TinyLlama) -> None:
    path = tiny_llama()
    stored = sum(tensor.nbytes for tensor in load_file(path / "model.safetensors").values())
    assert load_decoder(path).weight_bytes == stored
    assert load_decoder(path, torch.bfloat16).weight_bytes == stored // 2


def test_loading_imports_no_modelling_code(tiny_llama: TinyLlama) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from omniserve.model import loading, sampling, tokenizer\n"
        f"path = Path({str(tiny_llama())!r})\n"
        "loading.load_decoder(path); tokenizer.Tokenizer(path)\n"
        "print([name for name in sys.modules if name.partition('.')[0] == 'transformers'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_local_folder_is_taken_as_it_is(folder: Path) -> None:
    assert ensure_model(folder) == folder
    assert ensure_model(str(folder)) == folder


def test_an_unknown_model_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"'/no/model' is neither a local folder.* known names: smollm2-135m"
    ):
        ensure_model("/no/model")
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        ensure_model(tmp_path)


def test_a_missing_file_of_several_is_named(folder: Path) -> None:
    weight_map = {"model.norm.weight": "model.safetensors", "lm_head.weight": "model-9.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match=r"1 of 2 files it names are not there: model-9\.safetensors"):
        load_decoder(folder)


def test_a_pickle_is_named_and_never_loaded(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle, which is never loaded"):
        load_decoder(folder)


def test_a_long_load_shows_how_far_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load_decoder(folder, show_progress=True)
    assert capsys.readouterr().err == ""  # no terminal, nothing long
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    load_decoder(folder, show_progress=True)
    assert "loading" not in capsys.readouterr().err
    monkeypatch.setattr(loading, "_LONG_LOAD_BYTES", 1)
    load_decoder(folder, show_progress=True)
    shown = capsys.readouterr().err
    assert "loading model" in shown
    total = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values()) / 1e6
    assert f"{total:.1f}/{total:.1f} MB" in shown  # every byte was counted
