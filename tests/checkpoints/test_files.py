"""Weight files are read lazily, and never run what is in them."""

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from samdistill.checkpoints.files import locate, open_weights
from samdistill.checkpoints.inspect import inspect_path
from samdistill.checkpoints.merge import merge
from samdistill.types import UserError

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


class Malicious:
    """Unpickling this creates a file."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return (os.system, (f"touch {self.witness}",))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "plain pickle"])
@pytest.mark.parametrize("verb", ["open", "inspect", "merge"])
def test_a_pickle_that_runs_code_is_refused_and_its_code_never_runs(zipped, verb, tmp_path):
    witness, path = tmp_path / "witness", tmp_path / "model.pt"
    content = {"model": {"weight": torch.ones(2)}, "extra": Malicious(witness)}
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(Malicious(witness)))
    with pytest.raises(UserError, match=r"model\.pt: refused") as caught:
        match verb:
            case "open":
                open_weights(path)
            case "inspect":
                inspect_path(path)
            case "merge":
                merge(tmp_path, path, tmp_path / "out.pt")
    assert "\n" not in str(caught.value)
    assert not witness.exists()
    if not zipped:  # the file is what it claims to be: plain pickle does run it
        pickle.loads(path.read_bytes())
        assert witness.exists()


def damage(path, how: str) -> None:
    raw = path.read_bytes()
    path.write_bytes(
        {"cut": raw[: len(raw) // 2], "cut early": raw[:20], "garbage": b"\x89PNG" * 50, "empty": b""}[how]
    )


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("how", ["cut", "cut early", "garbage", "empty"])
def test_a_damaged_file_is_one_clear_line(suffix, how, tmp_path):
    path = tmp_path / f"weights{suffix}"
    state = {"w": torch.randn(1000)}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    damage(path, how)
    with pytest.raises(UserError) as caught:
        open_weights(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
def test_torch_files_old_and_new_with_and_without_a_wrapper(zipped, wrapped, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"model": TENSORS, "epoch": 3} if wrapped else TENSORS, path, _use_new_zipfile_serialization=zipped)
    weights = open_weights(path)
    assert weights.wrapped == wrapped
    assert {k: (v.shape, v.dtype) for k, v in weights.info.items()} == {
        "a.weight": ((2, 3), torch.float32),
        "b": ((4,), torch.bfloat16),
    }
    assert all(torch.equal(weights[name], TENSORS[name]) for name in TENSORS)
    assert weights.info["b"].bytes == 8


def test_a_sharded_folder_reads_as_one(tmp_path):
    save_file({"a.weight": TENSORS["a.weight"]}, tmp_path / "model-1.safetensors")
    save_file({"b": TENSORS["b"]}, tmp_path / "model-2.safetensors")
    index = '{"weight_map": {"a.weight": "model-1.safetensors", "b": "model-2.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    weights = open_weights(tmp_path)
    assert sorted(weights) == ["a.weight", "b"]
    assert all(torch.equal(weights[name], TENSORS[name]) for name in TENSORS)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-2\.safetensors: missing"):
        open_weights(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(index.replace('"b"', '"c"'))
    save_file({"b": TENSORS["b"]}, tmp_path / "model-2.safetensors")
    with pytest.raises(UserError, match="1 tensors of the index are in no shard, such as c"):
        open_weights(tmp_path)


def test_other_contents_and_places_are_named(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    with pytest.raises(UserError, match=r"list\.pt: holds a list"):
        open_weights(tmp_path / "list.pt")
    with pytest.raises(UserError, match=r"none\.pt: holds no named tensors \(top-level keys: epoch\)"):
        open_weights(tmp_path / "none.pt")
    torch.save({"model": {"a": torch.ones(2), "b": torch.eye(3).to_sparse()}}, tmp_path / "sparse.pt")
    with pytest.raises(UserError, match=r"sparse\.pt: b is a sparse tensor; save it with \.to_dense\(\)"):
        open_weights(tmp_path / "sparse.pt")
    (tmp_path / "sparse.pt").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors.*it holds list\.pt: give that file"):
        open_weights(tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        open_weights(tmp_path / "absent")
    assert locate(tmp_path) == tmp_path
