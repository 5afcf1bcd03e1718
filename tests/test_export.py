"""Encoders that leave for other programs, and come back bit for bit."""

import json
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_runs import load_tiniest
from torch import Tensor

import hubconf
from capi import pretrained
from capi.checkpoint import save_checkpoint, save_encoder, save_heads
from capi.config import Config, to_yaml
from capi.distributed import World
from capi.export.__main__ import main
from capi.export.plain import PlainEncoder
from capi.model import CAPI, Backbone, Student
from capi.step import Trainer

ROOT = Path(__file__).parent.parent
ATTENTION = [f"fn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "proj")]
BLOCK = [
    *(f"residual1.{name}" for name in ("norm.weight", "fn.rope.freqs", *ATTENTION)),
    *(f"residual2.{name}" for name in ("norm.weight", "fn.fc1.weight", "fn.fc2.weight")),
]


def official_names(encoder_depth: int, predictor_depth: int) -> set[str]:
    """The state of the official model, by its released code."""
    stacks = {"encoder": encoder_depth, "decoder": predictor_depth}
    blocks = {f"{stack}.blocks.{i}.{name}" for stack, n in stacks.items() for i in range(n) for name in BLOCK}
    return blocks | {"mask_token", "registers", "patch_embed.weight", "patch_embed.bias"}


@pytest.fixture
def config(tmp_path) -> Config:
    config = load_tiniest(tmp_path)
    return replace(config, model=replace(config.model, encoder_depth=2))


@pytest.fixture
def model(config) -> CAPI:
    """Student, moving average and teacher all differ."""
    trainer = Trainer(config, World(0, 1, torch.device("cpu")))
    with torch.no_grad():
        for parameter in trainer.model.student_ema.parameters():
            parameter.mul_(1.1)
        trainer.model.teacher["head"].layer.bias.normal_()
    return trainer.model.eval()


@pytest.fixture
def run_dir(config, model, tmp_path) -> Path:
    """A finished run's folder, its checkpoint included."""
    run_dir = tmp_path / "run"
    values = yaml.safe_load(to_yaml(config))
    state = {"step": 6, "trainer": {"model": model.state_dict()}, "streams": [], "config": values}
    save_checkpoint(run_dir, 6, state, keep=1)
    save_encoder(run_dir / "encoder.safetensors", model.student_ema, config.model)
    save_heads(run_dir / "heads.safetensors", model)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    return run_dir


def export(encoder: Path, form: str, output: Path, *options: str) -> Path:
    assert main([str(encoder), "--format", form, "--output", str(output), *options]) == 0
    return output


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """The one line of a refusal."""
    assert main(list(map(str, arguments))) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name]), name


def assert_same_encoder(loaded: Backbone, expected: Backbone) -> None:
    assert_equal(loaded.state_dict(), expected.state_dict())
    images = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8)
    with torch.no_grad():
        for ours, theirs in zip(loaded(images), expected(images), strict=True):
            assert torch.equal(ours, theirs)


def assert_prototypes(path: Path, model: CAPI) -> None:
    layer = model.teacher["head"].layer
    for ours, theirs in zip(pretrained.load_prototypes(path), (layer.weight, layer.bias), strict=True):
        assert torch.equal(ours, theirs)


def test_the_official_layout_has_the_official_names(run_dir, model, config, tmp_path, capsys) -> None:
    path = export(run_dir, "official", tmp_path / "new" / "capi.pth")
    assert capsys.readouterr().out == f"wrote {path}\n"
    state = torch.load(path, weights_only=True)
    backbone = {name.removeprefix("backbone."): x for name, x in state.items() if name.startswith("backbone.")}
    assert backbone.keys() == official_names(2, 1)
    assert_equal(backbone, model.student_ema.backbone.state_dict())
    heads = {
        "head.last_layer.weight_g",
        "head.last_layer.weight_v",
        "teacher.head.layer.weight",
        "teacher.head.layer.bias",
    }
    assert {name for name in state if not name.startswith("backbone.")} == heads
    assert_same_encoder(pretrained.load(path), model.student_ema.backbone)
    assert_prototypes(path, model)


def test_the_student_of_a_run_that_is_not_finished(run_dir, model, tmp_path) -> None:
    for path in run_dir.glob("*.safetensors"):
        path.unlink()
    path = export(run_dir, "official", tmp_path / "student.pth", "--weights", "student")
    assert_same_encoder(pretrained.load(path), model.student.backbone)
    assert torch.equal(torch.load(path)["head.last_layer.weight_v"], model.student.head.last_layer.weight_v)
    assert_prototypes(path, model)


def test_files_come_back_bit_for_bit_whatever_their_type(run_dir, model, tmp_path) -> None:
    """official -> safetensors -> repository -> official, of half precision too."""
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(dtype)
        folder.mkdir()
        official = {name: x.to(dtype) for name, x in model.student_ema.state_dict().items()}
        torch.save(official, folder / "capi.pth")
        export(folder / "capi.pth", "safetensors", folder / "capi.safetensors")
        assert_equal(load_file(folder / "capi.safetensors"), official)
        export(folder / "capi.safetensors", "hub", folder / "repository")
        export(folder / "repository", "official", folder / "again.pth")
        again = torch.load(folder / "again.pth", weights_only=True)
        assert_equal(again, {name: x for name, x in official.items() if name.startswith("backbone.")})
        assert not (folder / "repository" / "config.yaml").exists()


def test_an_exported_file_of_safetensors_has_the_shape_of_the_run(run_dir, model, config, tmp_path) -> None:
    path = export(run_dir, "safetensors", tmp_path / "capi.safetensors")
    assert_same_encoder(pretrained.load(path, config.model), model.student_ema.backbone)
    assert_prototypes(path, model)
    header = path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")]
    assert json.loads(json.loads(header)["__metadata__"]["config"]) == asdict(config.model)


def test_a_repository_loads_offline_and_describes_itself(run_dir, model, config, tmp_path, monkeypatch) -> None:
    from capi.hub import Encoder

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = export(run_dir, "hub", tmp_path / "my-encoder")
    encoder = Encoder.from_pretrained(folder)
    assert not encoder.training
    assert encoder.config == config.model
    assert_same_encoder(encoder, model.student_ema.backbone)
    assert_same_encoder(pretrained.load(folder), model.student_ema.backbone)
    assert_prototypes(folder, model)
    public = replace(config, run=replace(config.run, output_dir="run"))  # without the path of this machine
    assert pretrained.run_configuration(pretrained.read(folder)) == public
    heads = load_file(folder / "heads.safetensors")
    assert torch.equal(heads["student_ema.head.last_layer.weight_v"], model.student_ema.head.last_layer.weight_v)
    card = (folder / "README.md").read_text()
    data = yaml.safe_load(card.split("---")[1])
    assert (data["library_name"], data["pipeline_tag"]) == ("capi", "image-feature-extraction")
    assert "# my-encoder\n" in card
    assert 'Encoder.from_pretrained("OWNER/my-encoder")' in card
    assert "encoder 2 x 16, predictor 1 x 16" in card
    assert "the teacher's 16 prototypes" in card
    assert public == pretrained.config_of(yaml.safe_load(card.split("```yaml\n")[1].split("```")[0]))

    encoder.save_pretrained(tmp_path / "by-itself")
    assert_same_encoder(Encoder.from_pretrained(tmp_path / "by-itself"), encoder)
    assert "Configuration" not in (tmp_path / "by-itself" / "README.md").read_text()
    state = load_file(folder / "model.safetensors")
    del state["registers"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(RuntimeError, match="registers"):
        Encoder.from_pretrained(folder)


def test_a_repository_knows_what_weights_do_not_show(config, tmp_path) -> None:
    from capi.hub import Encoder

    other = replace(config.model, predictor_dim=24, n_registers=3, register_coordinates="zeros", out_layer=1)
    student = Student(other, 8)
    student.backbone.init_weights()
    student.head.init_weights()
    save_encoder(tmp_path / "encoder.safetensors", student, other)
    folder = export(tmp_path / "encoder.safetensors", "hub", tmp_path / "repository")
    for loaded in (pretrained.load(folder), Encoder.from_pretrained(folder)):
        assert_same_encoder(loaded, student.backbone)
    (folder / "config.json").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        pretrained.load(folder)


def test_a_repository_is_replaced_whole(run_dir, tmp_path) -> None:
    """Heads of another encoder would pass for this one's."""
    from capi.hub import Encoder

    folder = export(run_dir, "hub", tmp_path / "encoder")
    (folder / "notes.txt").write_text("kept")
    state = torch.load(export(run_dir, "official", tmp_path / "capi.pth"), weights_only=True)
    torch.save({name: x + 1 for name, x in state.items() if name.startswith("backbone.")}, tmp_path / "bare.pth")
    export(tmp_path / "bare.pth", "hub", folder, "--overwrite")
    names = {"README.md", "config.json", "model.safetensors", "notes.txt"}
    assert {path.name for path in folder.iterdir()} == names
    assert_same_encoder(Encoder.from_pretrained(folder), pretrained.load(tmp_path / "bare.pth"))


def test_torch_hub_finds_the_entry_points(run_dir, model) -> None:
    listed = {name for name, entry in vars(hubconf).items() if callable(entry) and not name.startswith("_")}
    assert listed == {"encoder", *pretrained.OFFICIAL_WEIGHTS}
    for weights, expected in (("ema", model.student_ema), ("student", model.student)):
        encoder = torch.hub.load(str(ROOT), "encoder", run_dir, weights=weights, source="local")
        assert_same_encoder(encoder, expected.backbone)


@pytest.mark.parametrize("shape", [(2, 3, 12, 20), (1, 3, 4, 20), (3, 3, 4, 4)])
def test_the_plain_encoder_is_the_encoder(shape, model, config) -> None:
    images = torch.randn(shape)
    other = replace(config.model, predictor_dim=24, predictor_heads=3, scale_registers=False, out_layer=1)
    for backbone in (model.student_ema.backbone, Backbone(other).init_weights()):
        with torch.no_grad():
            assert_close(PlainEncoder(backbone)(images), backbone(images))


def assert_close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape
        assert float((one - other).abs().max()) < 1e-5 * float(other.abs().max())


def test_onnx_of_any_batch_and_size(model, tmp_path) -> None:
    onnx, onnxruntime = (pytest.importorskip(name) for name in ("onnx", "onnxruntime"))

    backbone = model.student_ema.backbone
    del backbone.encoder.blocks[1]  # Traced for half a second, and more where types are checked.
    torch.save(backbone.state_dict(), tmp_path / "encoder.pth")
    path = export(tmp_path / "encoder.pth", "onnx", tmp_path / "encoder.onnx")
    graph = onnx.load(path)
    onnx.checker.check_model(graph)
    assert {node.domain for node in graph.graph.node} <= {""}  # operations of the standard alone
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    assert metadata["patch_size"] == "4"
    assert json.loads(metadata["std"]) == [0.229, 0.224, 0.225]
    session = onnxruntime.InferenceSession(path)
    assert [output.name for output in session.get_outputs()] == ["global_vector", "registers", "feature_map"]
    for shape in ((2, 3, 12, 20), (1, 3, 40, 24), (5, 3, 8, 4)):
        images = torch.randn(shape)
        with torch.no_grad():
            outputs = tuple(map(torch.from_numpy, session.run(None, {"images": images.numpy()})))
            assert_close(outputs, backbone(images))


def test_what_cannot_be_written_is_refused_in_one_line(run_dir, tmp_path, capsys) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("mine")
    folder.mkdir()
    (folder / "mine").write_text("mine")
    for form, output, message in (
        ("pth", tmp_path / "x", "the format must be one of official, safetensors, hub, onnx, got pth"),
        ("official", file, f"{file} is there already: expected another output, or --overwrite"),
        ("hub", folder, f"{folder} is there already: expected another output, or --overwrite"),
        ("hub", file, f"a repository is a folder: expected a path for one, got the file {file}"),
        ("onnx", folder, f"expected the path of a file, got the folder {folder}"),
        ("safetensors", file / "x", f"the folder {file} could not be made: File exists"),
        ("hub", file / "y" / "x", f"the folder {file}/y could not be made: Not a directory"),
        ("official", tmp_path / ("x" * 300), "File name too long"),
    ):
        assert message in refused(capsys, run_dir, "--format", form, "--output", output)
    assert "expected the path of a" in refused(capsys, tmp_path / "no", "--format", "hub", "--output", tmp_path / "x")
    weights = ("--weights", "teacher", "--format", "hub", "--output", tmp_path / "x")
    assert "weights must be ema or student, got teacher" in refused(capsys, run_dir, *weights)
    assert file.read_text() == (folder / "mine").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "run", "tiniest.yaml"]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As on a full disk: whatever writes more fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("form", ["official", "safetensors", "hub"])
def test_a_full_disk_leaves_what_was_there(form, run_dir, tmp_path, capsys) -> None:
    new, earlier = tmp_path / "new", tmp_path / "earlier"
    if form == "hub":
        export(run_dir, form, earlier)
    else:
        earlier.write_text("mine")
    capsys.readouterr()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with files_of_at_most(4096):
        for output in (new, earlier):
            line = refused(capsys, run_dir, "--format", form, "--output", output, "--overwrite")
            assert "could not be written: " in line
            assert "File too large" in line
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert not new.exists()


@pytest.mark.parametrize("form", ["official", "hub"])
def test_an_interrupt_leaves_nothing(form, run_dir, tmp_path, monkeypatch, capsys) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    assert main([str(run_dir), "--format", form, "--output", str(tmp_path / "new")]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "tiniest.yaml"]


@pytest.mark.parametrize(("missing", "form"), [("onnxscript", "onnx"), ("huggingface_hub", "hub")])
def test_a_missing_package_is_named(missing, form, run_dir, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.delitem(sys.modules, "capi.hub", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    line = refused(capsys, run_dir, "--format", form, "--output", tmp_path / "new")
    assert f"(pip install 'capi[{form}]')" in line
    assert not (tmp_path / "new").exists()
