import argparse
import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from capi import pretrained
from capi.checkpoint import save_checkpoint, save_encoder, save_heads
from capi.config import ModelConfig, load_config, to_yaml
from capi.distributed import World
from capi.model import CAPI, Student
from capi.step import Trainer

SHAPE = ModelConfig(patch_size=4, embed_dim=16, num_heads=2, encoder_depth=2, predictor_depth=1, n_registers=4)


@pytest.fixture
def student() -> Student:
    torch.manual_seed(0)
    student = Student(SHAPE, 8)
    student.backbone.init_weights()
    student.head.init_weights()
    return student.eval()


def assert_same_features(loaded: torch.nn.Module, student: Student) -> None:
    images = torch.randn(2, 3, 12, 20)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    with torch.no_grad():
        for ours, expected in zip(loaded(images), student.backbone(images), strict=True):
            assert torch.equal(ours, expected)


def test_an_exported_encoder_brings_its_own_shape(student, tmp_path) -> None:
    save_encoder(tmp_path / "encoder.safetensors", student, SHAPE)
    assert_same_features(pretrained.load(tmp_path / "encoder.safetensors"), student)


def test_what_weights_do_not_show_comes_with_an_export(tmp_path) -> None:
    other = {"predictor_dim": 24, "predictor_heads": 3, "out_layer": 1, "rope_max_frequency": 5.0}
    for shape in (replace(SHAPE, **other), replace(SHAPE, register_coordinates="zeros", scale_registers=False)):
        student = Student(shape, 8)
        student.backbone.init_weights()
        save_encoder(tmp_path / "encoder.safetensors", student.eval(), shape)
        loaded = pretrained.load(tmp_path / "encoder.safetensors", shape)
        assert_same_features(loaded, student)
        assert loaded.config == replace(shape, drop_path_rate=0.0)
    description = str(pretrained.read(tmp_path / "encoder.safetensors"))
    assert "predictor 1 x 16, 2 heads, 4 registers" in description


def test_what_a_bare_state_does_not_say_is_as_the_caller_says(tmp_path) -> None:
    shape = replace(SHAPE, register_coordinates="zeros", out_layer=0)
    student = Student(shape, 8)
    student.backbone.init_weights()
    torch.save(student.state_dict(), tmp_path / "capi.pth")
    assert_same_features(pretrained.load(tmp_path / "capi.pth", shape), student.eval())
    save_encoder(tmp_path / "encoder.safetensors", student, shape)
    with pytest.raises(ValueError, match="it says out_layer 1, they have 0"):
        pretrained.load(tmp_path / "encoder.safetensors", replace(shape, out_layer=1))


def test_an_export_of_an_earlier_version_has_what_there_was(student, tmp_path) -> None:
    known = ("patch_size", "embed_dim", "num_heads", "encoder_depth", "predictor_depth", "n_registers")
    metadata = {"config": json.dumps({**{name: asdict(SHAPE)[name] for name in known}, "drop_path_rate": 0.2})}
    save_file(student.backbone.state_dict(), tmp_path / "encoder.safetensors", metadata)
    assert_same_features(pretrained.load(tmp_path / "encoder.safetensors", SHAPE), student)


def test_an_official_file_on_disk(student, tmp_path) -> None:
    torch.save(student.state_dict(), tmp_path / "capi.pth")
    assert_same_features(pretrained.load(tmp_path / "capi.pth"), student)
    assert_same_features(pretrained.load(tmp_path / "capi.pth", SHAPE), student)


def test_an_official_name_is_downloaded_once(student, tmp_path, monkeypatch) -> None:
    """The same download code on a file:// address."""
    torch.save(student.state_dict(), tmp_path / "capi_vitl14_i22k.pth")
    monkeypatch.setattr(pretrained, "OFFICIAL", tmp_path.as_uri())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    assert_same_features(pretrained.load("capi_vitl14_in22k", SHAPE), student)
    assert (tmp_path / "hub" / "checkpoints" / "capi_vitl14_i22k.pth").exists()
    (tmp_path / "capi_vitl14_i22k.pth").unlink()
    assert_same_features(pretrained.load("capi_vitl14_in22k"), student)
    with pytest.raises(ValueError, match=r"capi_vitl14_lvd.pth cannot be downloaded to .*; without a network, put the"):
        pretrained.load("capi_vitl14_lvd")
    for ask in (partial(pretrained.load, weights="student"), pretrained.load_prototypes):
        with pytest.raises(ValueError, match="has the moving average alone: expected a run"):
            ask("capi_vitl14_in22k")


def test_an_official_file_that_changed_is_not_loaded(student, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(pretrained, "OFFICIAL", tmp_path.as_uri())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    source, cached = tmp_path / "capi_vitl14_i22k.pth", tmp_path / "hub" / "checkpoints" / "capi_vitl14_i22k.pth"
    torch.save(student.state_dict(), source)
    whole = source.read_bytes()
    source.write_bytes(whole[:-1000])
    with pytest.raises(ValueError, match="cannot be read as weights"):
        pretrained.load("capi_vitl14_in22k")
    assert list(cached.parent.iterdir()) == []  # The next load tries anew.
    source.write_bytes(whole)
    pretrained.load("capi_vitl14_in22k")
    record = cached.with_name(f"{cached.name}.sha256")
    assert record.read_text() == f"{hashlib.sha256(whole).hexdigest()}  {cached.name}\n"
    assert_same_features(pretrained.load("capi_vitl14_in22k"), student)

    torch.save({name: tensor + 1 for name, tensor in student.state_dict().items()}, cached)
    with pytest.raises(ValueError, match=r"is not what it was at its first load: .* remove both to download it again"):
        pretrained.load("capi_vitl14_in22k")
    assert cached.exists()
    record.write_text("")
    with pytest.raises(ValueError, match="or its checksum in"):
        pretrained.load("capi_vitl14_in22k")
    record.unlink()
    monkeypatch.setattr(pretrained, "write_atomically", raises(OSError("read-only")))
    pretrained.load("capi_vitl14_in22k")
    assert "is not recorded: read-only" in caplog.text


def raises(error: Exception) -> Callable:
    def function(*arguments):
        raise error

    return function


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "module._orig_mod.",
        "student_ema.",
        "model.student_ema.",
        "_fsdp_wrapped_module.x.module.",
    ],
)
def test_prefixes_of_what_wrapped_the_model_are_taken_off(prefix, student, tmp_path) -> None:
    torch.save({prefix + name: tensor for name, tensor in student.state_dict().items()}, tmp_path / "wrapped.pth")
    assert_same_features(pretrained.load(tmp_path / "wrapped.pth"), student)


def test_wrappers_within_the_model_are_taken_off(student, tmp_path) -> None:
    """As torch.compile, FSDP and activation checkpointing of single blocks leave them."""
    for wrapper in ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module._checkpoint_wrapped_module"):
        state = {name.replace("blocks.0.", f"blocks.0.{wrapper}."): x for name, x in student.state_dict().items()}
        save_file(state, tmp_path / "blocks.safetensors")
        assert_same_features(pretrained.load(tmp_path / "blocks.safetensors"), student)


@pytest.mark.parametrize("key", ["state_dict", "model", "teacher", "student", "model_ema"])
def test_weights_nested_beside_other_things(key, student, tmp_path) -> None:
    optimizer = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]}
    other = {"epoch": 3, "optimizer": optimizer, "args": argparse.Namespace(lr=0.1), 0: 1}
    torch.save({key: student.state_dict(), **other}, tmp_path / "nested.pth")
    assert_same_features(pretrained.load(tmp_path / "nested.pth"), student)


def test_a_backbone_alone_without_a_prefix(student, tmp_path) -> None:
    torch.save(student.backbone.state_dict(), tmp_path / "backbone.pth", _use_new_zipfile_serialization=False)
    assert_same_features(pretrained.load(tmp_path / "backbone.pth"), student)


@pytest.mark.parametrize(
    "names", [("student", "student_ema"), ("student", "teacher"), ("model", "ema"), ("teacher", "state_dict_ema")]
)
def test_of_two_encoders_the_moving_average_is_taken(names, student, tmp_path) -> None:
    other = {name: tensor + 1 for name, tensor in student.state_dict().items()}
    torch.save({names[0]: other, names[1]: student.state_dict()}, tmp_path / "both.pth")
    assert_same_features(pretrained.load(tmp_path / "both.pth"), student)


def test_two_encoders_of_one_kind_are_not_chosen_between(student, tmp_path) -> None:
    torch.save({"first": student.state_dict(), "second": student.state_dict()}, tmp_path / "two.pth")
    with pytest.raises(ValueError, match=r"holds several encoders.*: first.backbone, second.backbone"):
        pretrained.load(tmp_path / "two.pth")


def write_checkpoint(run_dir: Path, step: int, seed: int) -> CAPI:
    """A checkpoint as training writes it, whose moving average differs from the student."""
    options = ["--clustering.n_prototypes", "8", "--data.image_size", "8", "--run.seed", str(seed)]
    config = replace(load_config(options), model=replace(SHAPE, drop_path_rate=0.1))
    trainer = Trainer(config, World(0, 1, torch.device("cpu")))
    with torch.no_grad():
        for parameter in trainer.model.student_ema.parameters():
            parameter.add_(0.1)
    state = {
        "step": step,
        "trainer": {"model": trainer.model.state_dict()},
        "streams": [],
        "config": yaml.safe_load(to_yaml(config)),
    }
    save_checkpoint(run_dir, step, state, keep=3)
    return trainer.model.eval()


def test_a_training_checkpoint_gives_its_moving_average_and_says_so(tmp_path, caplog) -> None:
    ema = write_checkpoint(tmp_path, 4, seed=0).student_ema
    caplog.set_level(logging.INFO)
    assert_same_features(pretrained.load(tmp_path / "checkpoints" / "step_000000004"), ema)
    (record,) = (record for record in caplog.records if record.name == "capi.pretrained")
    assert "a training checkpoint after step 4, of which trainer.model.student_ema.backbone is taken" in record.message
    assert "encoder 2 x 16, predictor 1 x 16, 2 heads, 4 registers, patches of 4" in record.message


def test_a_run_folder_gives_its_export_or_its_newest_checkpoint(student, tmp_path, monkeypatch) -> None:
    write_checkpoint(tmp_path, 4, seed=0)
    newest = write_checkpoint(tmp_path, 8, seed=1).student_ema
    assert_same_features(pretrained.load(tmp_path), newest)
    assert_same_features(pretrained.load(str(tmp_path / "checkpoints")), newest)
    save_encoder(tmp_path / "encoder.safetensors", student, SHAPE)
    assert_same_features(pretrained.load(tmp_path), student)
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert_same_features(pretrained.load(f"~/{tmp_path.name}"), student)
    (tmp_path / "encoder.safetensors").rename(tmp_path / "ENCODER.SAFETENSORS")
    assert_same_features(pretrained.load(f"~/{tmp_path.name}/ENCODER.SAFETENSORS"), student)


def test_a_checkpoint_gives_its_student_where_that_is_asked_for(student, tmp_path) -> None:
    model = write_checkpoint(tmp_path, 4, seed=0)
    save_encoder(tmp_path / "encoder.safetensors", student, SHAPE)
    for name in (tmp_path, tmp_path / "checkpoints" / "step_000000004"):
        assert_same_features(pretrained.load(name, weights="student"), model.student)
    with pytest.raises(ValueError, match=r"holds no student: expected a training checkpoint, got the encoder backbone"):
        pretrained.load(tmp_path / "encoder.safetensors", weights="student")
    (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"expected checkpoints/step_\* in .*, found none"):
        pretrained.load(tmp_path, weights="student")
    with pytest.raises(ValueError, match="weights must be ema or student, got teacher"):
        pretrained.load(tmp_path, weights="teacher")


def test_prototypes_are_found_wherever_a_run_leaves_them(student, tmp_path) -> None:
    layer = write_checkpoint(tmp_path, 4, seed=0).teacher["head"].layer
    names = [tmp_path, tmp_path / "checkpoints" / "step_000000004"]

    def assert_found(names: list[Path], layer: torch.nn.Linear) -> None:
        for name in names:
            for ours, expected in zip(pretrained.load_prototypes(name), (layer.weight, layer.bias), strict=True):
                assert torch.equal(ours, expected)

    assert_found(names, layer)
    save_encoder(tmp_path / "encoder.safetensors", student, SHAPE)
    names.append(tmp_path / "encoder.safetensors")
    assert_found(names, layer)
    newer = write_checkpoint(tmp_path / "other", 4, seed=1)
    save_heads(tmp_path / "heads.safetensors", newer)
    assert_found([tmp_path, names[2], tmp_path / "heads.safetensors"], newer.teacher["head"].layer)


def test_prototypes_that_are_not_there_or_no_prototypes(student, tmp_path) -> None:
    torch.save(student.state_dict(), tmp_path / "capi.pth")
    with pytest.raises(ValueError, match=r"capi.pth comes without prototypes: expected a run's folder, a checkpoint"):
        pretrained.load_prototypes(tmp_path / "capi.pth")
    names = ("teacher.head.layer.weight", "x.teacher.head.layer.weight", "teacher.head.layer.bias")
    save_file({name: torch.zeros(3, 4) for name in names[:2]}, tmp_path / "two.safetensors")
    save_file({name: torch.zeros(3, 4) for name in names[::2]}, tmp_path / "shape.safetensors")
    save_file({names[0]: torch.zeros(3, 4)}, tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="holds several clusterings"):
        pretrained.load_prototypes(tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"must be \[prototypes, dim\] and \[prototypes\], got \[\[3, 4\], \[3, 4\]\]"):
        pretrained.load_prototypes(tmp_path / "shape.safetensors")
    assert pretrained.load_prototypes(tmp_path / "none.safetensors").bias is None


def test_clusters_are_the_largest_logits_of_the_teacher(tmp_path) -> None:
    teacher = write_checkpoint(tmp_path, 4, seed=0).teacher["head"]
    with torch.no_grad():
        teacher.layer.bias.uniform_(-2, 2)
    prototypes = pretrained.Prototypes(teacher.layer.weight.detach(), teacher.layer.bias.detach())
    features = 7 * torch.randn(2, 48, 50, 16)
    logits = teacher.layer(torch.nn.functional.normalize(features, dim=-1))
    assert torch.equal(pretrained.clusters(features, prototypes), logits.argmax(-1))
    unbiased = pretrained.clusters(features, prototypes._replace(bias=None))
    assert torch.equal(unbiased, (logits - teacher.layer.bias).argmax(-1))
    with pytest.raises(ValueError, match="the prototypes' 16 channels, got 8"):
        pretrained.clusters(features[..., :8], prototypes)


def test_features_of_the_batches_of_a_loader(student) -> None:
    images, labels = torch.randint(0, 256, (5, 3, 14, 9), dtype=torch.uint8), torch.arange(5)
    backbone = student.backbone.requires_grad_(False)
    expected = backbone(images, resize="multiple")
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=2)
    *features, seen = zip(*pretrained.features_of(backbone, loader, resize="multiple"), strict=True)
    assert torch.equal(torch.cat(seen), labels)
    for ours, theirs in zip(features, expected, strict=True):
        torch.testing.assert_close(torch.cat(ours), theirs, rtol=0, atol=1e-5)
    (of_floats,) = pretrained.features_of(backbone.to(torch.bfloat16), [torch.randn(2, 3, 8, 8)])
    assert [x.dtype for x in of_floats] == [torch.float32] * 3
    for batch in ([labels], [{"images": images}], images):
        with pytest.raises(TypeError, match=r"batches must begin with images \[images, 3, height, width\], got "):
            list(pretrained.features_of(backbone, batch))


class Touch:
    """Makes a file where it is unpickled."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


def files_that_cannot_be_loaded(folder: Path, student: Student) -> dict[str, tuple[str, object]]:
    """By name: what the message must hold, and what is written: bytes, text, or an object for torch.save."""
    state = student.state_dict()
    torch.save(state, folder / "whole.pt")
    save_encoder(folder / "whole.safetensors", student, SHAPE)
    first = "backbone.encoder.blocks.0.residual1.fn.q_proj.weight"
    return {
        "page.pth": ("an HTML or XML page", " \n<!DOCTYPE html><html>404</html>"),
        "page.safetensors": ("an HTML or XML page", "<html>404</html>"),
        "pointer.pth": ("a Git LFS pointer", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "empty.pth": ("it is empty", b""),
        "noise.pth": ("cannot be read as weights", bytes(range(256))),
        "truncated.pth": ("cannot be read as weights", (folder / "whole.pt").read_bytes()[:2000]),
        "truncated.safetensors": ("cannot be read as weights", (folder / "whole.safetensors").read_bytes()[:2000]),
        "module.pth": ("holds a pickled capi.model.Student, and unpickling it could run code", student),
        "code.pth": ("could run code", {**state, "x": Touch(str(folder / "touched"))}),
        "list.pth": ("holds no encoder of CAPI", [1, 2]),
        "number.pth": ("got no tensors", {"epoch": 3}),
        "dino.pth": ("got 1 tensors, such as blocks.0.attn.qkv.weight", {"blocks.0.attn.qkv.weight": torch.ones(2)}),
        "missing.pth": (f"1 of 31 are missing, such as {first[9:]}", {k: x for k, x in state.items() if k != first}),
        "unknown.pth": ("1 are unknown, such as pos_embed", {**state, "backbone.pos_embed": torch.ones(2)}),
        "shape.pth": ("q_proj.weight: expected [16, 16], got [16, 8]", {**state, first: state[first][:, :8]}),
        "integers.pth": ("q_proj.weight is a tensor of torch.int8", {**state, first: state[first].char()}),
        "registers.pth": ("the shape of the model cannot be told", {**state, "backbone.registers": torch.ones(3)}),
        "twice.pth": ("twice, once in a wrapper", {**state, f"module.{first}": state[first]}),
        "deep.pth": ("nested without end", endless()),
        "checkpoint.pth": ("whose configuration of the model is missing", {"trainer": state, "step": 3, "config": {}}),
    }


def endless() -> dict:
    value: dict = {}
    value["again"] = value
    return value


def test_what_cannot_be_loaded_is_a_value_error_of_one_line(student, tmp_path) -> None:
    for name, (expected, content) in files_that_cannot_be_loaded(tmp_path, student).items():
        path = tmp_path / name
        if isinstance(content, str | bytes):
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        else:
            torch.save(content, path)
        with pytest.raises(ValueError, match=name) as refusal:
            pretrained.load(path)
        assert expected in str(refusal.value), name
        assert "\n" not in str(refusal.value), name
        assert len(str(refusal.value)) < 400 + len(str(tmp_path)), name
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({**asdict(SHAPE), "swiglu": True}, r"is of a newer version: .* the unknown swiglu"),
        ({**asdict(SHAPE), "num_heads": 4}, r"it says num_heads 4, they have 2"),
        ({**asdict(SHAPE), "predictor_dim": 8}, r"it says predictor_dim 8, they have None"),
        ({**asdict(SHAPE), "out_layer": 9}, r"model.out_layer must lie from -3 to 2, got 9"),
        ({**asdict(SHAPE), "out_layer": "last"}, r"out_layer"),
        ({"embed_dim": "16"}, r"it says embed_dim 16, they have 16"),
        ([], r"must be a JSON object, got \[\]"),
    ],
)
def test_an_export_whose_configuration_is_not_that_of_its_weights(metadata, message, student, tmp_path) -> None:
    save_file(student.state_dict(), tmp_path / "encoder.safetensors", {"config": json.dumps(metadata)})
    with pytest.raises(ValueError, match=message):
        pretrained.load(tmp_path / "encoder.safetensors")


def test_a_header_whose_length_looks_like_text(student, tmp_path) -> None:
    """A length of 0x3c20 bytes begins with a space and a "<", as an HTML page may."""
    path = tmp_path / "encoder.safetensors"
    save_file(student.state_dict(), path)
    filler = 0x3C20 - int.from_bytes(path.read_bytes()[:8], "little") - len(',"__metadata__":{"note":""}')
    save_file(student.state_dict(), path, {"note": "x" * filler})
    assert path.read_bytes()[:2] == b" <"
    assert_same_features(pretrained.load(path), student)


def test_what_is_no_file_or_does_not_fit(student, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"one of capi_vitl14_lvd.*got capi_vitl14_nope"):
        pretrained.load("capi_vitl14_nope")
    for name in ("x" * 5000, "~nobody-of-this-name/encoder.safetensors", "\0"):
        with pytest.raises(ValueError, match=r"expected the path|cannot be read"):
            pretrained.load(name)
    with pytest.raises(ValueError, match=r"expected encoder.safetensors or checkpoints/step_\* in .*, found neither"):
        pretrained.load(tmp_path)
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(ValueError, match=r"expected the path of a .safetensors or .pth file"):
        pretrained.load(tmp_path / "pipe.pth")
    torch.save(student.state_dict(), tmp_path / "capi.pth")
    with pytest.raises(ValueError, match=r"capi.pth do not fit the model configuration: it says encoder_depth 3, they"):
        pretrained.load(tmp_path / "capi.pth", replace(SHAPE, encoder_depth=3))


def test_half_precision_is_widened(student, tmp_path) -> None:
    half = {name: x.half() for name, x in student.state_dict().items()}
    torch.save(half, tmp_path / "half.pth")
    loaded = pretrained.load(tmp_path / "half.pth")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    student.load_state_dict(half)
    assert_same_features(loaded, student)


def test_the_command_line_describes_files_and_lists_names(student, tmp_path, capsys) -> None:
    save_encoder(tmp_path / "encoder.safetensors", student, SHAPE)
    assert pretrained.main([str(tmp_path)]) == 0
    described = capsys.readouterr().out
    assert "encoder.safetensors: an exported encoder, of which backbone is taken; encoder 2 x 16" in described
    assert pretrained.main([]) == 0
    assert capsys.readouterr().out.split() == list(pretrained.OFFICIAL_WEIGHTS)
    assert pretrained.main([str(tmp_path / "none.pth")]) == 1
    assert capsys.readouterr().err.startswith("error: expected the path")
