import pytest
import torch

from capi import pretrained
from capi.checkpoint import save_encoder
from capi.config import ModelConfig
from capi.model import Student

SHAPE = ModelConfig(patch_size=4, embed_dim=16, num_heads=2, encoder_depth=2, predictor_depth=2, n_registers=4)


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


def test_an_official_file_on_disk(student, tmp_path) -> None:
    torch.save(student.state_dict(), tmp_path / "capi.pth")
    assert_same_features(pretrained.load(tmp_path / "capi.pth", SHAPE), student)


def test_an_official_name_goes_through_the_hub_loader(student, tmp_path, monkeypatch) -> None:
    """The same download code on a file:// address."""
    torch.save(student.state_dict(), tmp_path / "capi_vitl14_i22k.pth")
    monkeypatch.setattr(pretrained, "OFFICIAL", tmp_path.as_uri())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    assert_same_features(pretrained.load("capi_vitl14_in22k", SHAPE), student)
    assert (tmp_path / "hub" / "checkpoints" / "capi_vitl14_i22k.pth").exists()


def test_what_cannot_be_loaded(student, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"one of capi_vitl14_lvd.*got capi_vitl14_nope"):
        pretrained.load("capi_vitl14_nope")
    torch.save(student.state_dict(), tmp_path / "capi.pth")
    with pytest.raises(ValueError, match=r"capi.pth do not fit the model configuration"):
        pretrained.load(tmp_path / "capi.pth", ModelConfig(**{**SHAPE.__dict__, "encoder_depth": 3}))
