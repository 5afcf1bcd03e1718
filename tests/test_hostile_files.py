"""Files made to do harm, of every kind that is read: refused in one line, and no code of theirs runs."""

import ast
import io
import json
import os
import pickle
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import EpsImagePlugin, Image
from safetensors.torch import save_file
from tiny_runs import load_tiniest, tiniest

from capi import pretrained
from capi.checkpoint import load_checkpoint, save_encoder
from capi.config import ModelConfig, load_config
from capi.data import ImageStream
from capi.data.crops import centre_box, crop
from capi.data.shards import TarShards, hub_builder
from capi.evaluate.labelled import LabelledShards, Masks
from capi.model import Student
from capi.train import main

SHAPE = ModelConfig(patch_size=4, embed_dim=16, num_heads=2, encoder_depth=1, predictor_depth=1, n_registers=4)
ROOT = Path(__file__).parents[1]


class Payload:
    """Makes the folder `marker` where it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path):
    yield tmp_path / "marker"
    assert not (tmp_path / "marker").exists(), "a file ran code"


def zipped(path: Path, members: dict[str, bytes], **options) -> None:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in members.items():
            archive.writestr(f"archive/{name}", data)


def pickled(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps({"backbone.patch_embed.weight": Payload(marker)}))


def in_a_zip(path: Path, marker: Path) -> None:
    torch.save({"step": 1, "trainer": Payload(marker)}, path)


def of_old(path: Path, marker: Path) -> None:
    torch.save({"step": 1, "trainer": Payload(marker)}, path, _use_new_zipfile_serialization=False)


def of_older(path: Path, marker: Path) -> None:
    """The format of PyTorch's first year: pickles in a tar."""
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps(Payload(marker))
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def compressed(path: Path, marker: Path) -> None:
    """100 MiB in 100 kB; it could be without end."""
    zipped(path, {"data.pkl": bytes(100 * 2**20), "version": b"3"}, compression=zipfile.ZIP_DEFLATED)


PICKLES = (pickled, in_a_zip, of_old, of_older, compressed)


@pytest.mark.parametrize("write", PICKLES)
def test_weights_run_no_code(write: Callable, tmp_path, marker) -> None:
    write(tmp_path / "weights.pth", marker)
    with pytest.raises(ValueError, match=r"weights.pth (cannot be read as weights|holds a pickled)") as refusal:
        pretrained.load(tmp_path / "weights.pth")
    assert "\n" not in str(refusal.value)
    assert pretrained.main([str(tmp_path / "weights.pth")]) == 1


@pytest.mark.parametrize("write", PICKLES)
def test_a_checkpoint_runs_no_code(write: Callable, tmp_path, marker) -> None:
    write(tmp_path / "step_000000001.pt", marker)
    with pytest.raises(ValueError, match="it is damaged") as refusal:
        load_checkpoint(tmp_path / "step_000000001.pt")
    assert "\n" not in str(refusal.value)


def test_a_run_starts_beside_a_hostile_checkpoint(tmp_path, marker, caplog) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    in_a_zip(tmp_path / "run" / "checkpoints" / "step_000000001.pt", marker)
    assert main([*tiniest(tmp_path), "--optim.steps", "1"]) == 0
    assert "step_000000001.pt cannot be read, trying the one before" in caplog.text
    assert (tmp_path / "run.1" / "checkpoints" / "step_000000001.pt").exists()


def header(text: str, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text.encode()


SAFETENSORS = {
    "a header that is longer than the file": header('{"x": 1}', 2**62),
    "a header of a GiB": header('{"x": 1}', 2**30),
    "a header that is no JSON": header("{" * 64),
    "a tensor beyond the file": header('{"x":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4000000000]}}'),
    "a shape that overflows": header('{"x":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}'),
    "offsets that go back": header('{"x":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}') + bytes(4),
    "a header nested without end": header('{"x":' * 20_000),
    "a type that there is not": header('{"x":{"dtype":"CODE","shape":[1],"data_offsets":[0,4]}}') + bytes(4),
}


@pytest.mark.parametrize("what", SAFETENSORS)
def test_safetensors_whose_header_lies(what, tmp_path) -> None:
    (tmp_path / "encoder.safetensors").write_bytes(SAFETENSORS[what])
    with pytest.raises(ValueError, match=r"encoder.safetensors cannot be read as weights") as refusal:
        pretrained.load(tmp_path / "encoder.safetensors")
    assert "\n" not in str(refusal.value)


BOMB = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10) if i else 'x'}]\n" for i in range(12))
YAML = {
    "code": ("model: !!python/object/apply:os.mkdir [marker]\n", "could not determine a constructor"),
    "a module": ("model: !!python/module:os\n", "could not determine a constructor"),
    "aliases that multiply": (BOMB, "it must hold at most 10000 values"),
}


@pytest.mark.parametrize("what", YAML)
def test_yaml_runs_no_code(what, tmp_path, marker, capsys, monkeypatch) -> None:
    """As the file of an option, and beside an encoder."""
    monkeypatch.chdir(tmp_path)
    text, message = YAML[what]
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(SystemExit):
        load_config(["--config", "config.yaml"])
    assert message in capsys.readouterr().err
    save_encoder(tmp_path / "encoder.safetensors", Student(SHAPE, 16), SHAPE)
    with pytest.raises(ValueError, match=f"config.yaml cannot be read: .*{message}"):
        pretrained.run_configuration(pretrained.read(tmp_path))


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, "[1]", '"x"', ""])
def test_json_that_is_no_configuration(text, tmp_path) -> None:
    save_file(Student(SHAPE, 16).state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"the configuration in .* (is not JSON|must be a JSON object)"):
        pretrained.load(tmp_path)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(marker) (w) file closefile\n%%EOF\n"


def test_postscript_under_another_name_is_no_image(monkeypatch) -> None:
    """Pillow hands it to Ghostscript, an interpreter."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("Ghostscript was called"))
    for read in (lambda data: crop(data, 8, centre_box), lambda data: Masks().labels(data, 8)):
        with pytest.raises(OSError, match="cannot identify image file"):
            read(POSTSCRIPT)


def png(width: int, height: int) -> bytes:
    """Whose header says so; the data are those of one pixel."""
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize(
    "data", [png(2**30, 2**30), png(30_000, 30_000), b"<svg onload='x()'/>", b"\x89PNG", b"GIF89a"]
)
def test_an_image_that_would_not_fit_is_refused_unread(data) -> None:
    with pytest.raises((OSError, Image.DecompressionBombError)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        crop(data, 8, centre_box)


def hostile_tar(path: Path, outside: Path) -> None:
    """An image among members that lead elsewhere, are no files, or are larger than the archive."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "PNG")
    good = file.getvalue()
    kinds = {"b.png": tarfile.SYMTYPE, "c.png": tarfile.LNKTYPE, "d.png": tarfile.CHRTYPE, "e.png": tarfile.FIFOTYPE}
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for name in (str(outside / "absolute.png"), "../../above.png", "a.png"):
            member = tarfile.TarInfo(name)
            member.size = len(good)
            archive.addfile(member, io.BytesIO(good))
        for name, kind in kinds.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        archive.getmembers()
        end = archive.offset
    claims = tarfile.TarInfo("f.png")
    claims.size = 2**34
    path.write_bytes(path.read_bytes()[:end] + claims.tobuf(tarfile.GNU_FORMAT) + bytes(1024))


def test_a_tar_writes_nothing_and_of_its_members_only_files_are_read(tmp_path, marker) -> None:
    hostile_tar(tmp_path / "0.tar", marker)
    names, faults = [], []
    try:
        for name, read in TarShards(str(tmp_path / "0.tar"), "auto").shard(0):
            names.append(name.rpartition("/")[2])
            try:
                read()
            except ValueError as error:
                faults.append(str(error))
    except tarfile.ReadError as error:
        faults.append(str(error))
    assert names == ["absolute.png", "above.png", "0.tar:a.png", "0.tar:f.png"]
    assert faults[0] == "expected a member of at most 1 GiB, got 17179869184 bytes"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.tar"]
    with pytest.raises(ValueError, match=r"0.tar cannot be read: .*expected a member of at most 1 GiB"):
        list(LabelledShards(str(tmp_path / "0.tar"), "auto", "auto").items())


def test_a_stream_goes_on_past_a_hostile_member(tmp_path, marker, caplog) -> None:
    hostile_tar(tmp_path / "0.tar", marker)
    config = load_tiniest(tmp_path, "--data.source", f"wds:{tmp_path}/0.tar", "--optim.batch_size", "3")
    assert next(iter(ImageStream(config))).images.shape == (3, 3, 16, 16)


def test_a_data_set_runs_no_script(tmp_path, marker) -> None:
    place = tmp_path / "set"
    place.mkdir()
    (place / "set.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    (place / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: x.json\n---\n")
    (place / "x.json").write_text(json.dumps({"image": 1}))
    try:
        hub_builder(str(place))
    except ValueError as error:
        assert "\n" not in str(error)


LOADERS = {"pickle.load", "pickle.loads", "np.load", "numpy.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
LOADERS |= {"eval", "exec", "marshal.loads", "shelve.open", "torch.jit.load", "dill.load", "joblib.load"}


def test_no_source_calls_a_loader_that_could_run_code() -> None:
    for path in [*ROOT.glob("capi*/**/*.py"), ROOT / "hubconf.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called, options = ast.unparse(node.func), {option.arg: option.value for option in node.keywords}
                assert called not in LOADERS, f"{path}:{node.lineno} calls {called}"
                if called == "torch.load":
                    assert ast.unparse(options["weights_only"]) == "True", f"{path}:{node.lineno}"
                assert "trust_remote_code" not in options, f"{path}:{node.lineno}"
