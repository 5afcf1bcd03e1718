"""What a student sees, is asked, and answers."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from capi.config import ClusteringConfig, MaskingConfig, ModelConfig
from capi.masking import Masks
from capi.model import CAPI, normalize_images
from capi.visualize import masks as module
from capi.visualize.masks import Answers, ask, draw_masks
from capi.visualize.sheet import sheet

SHAPE = ModelConfig(4, 16, 2, encoder_depth=2, predictor_depth=1, n_registers=4, drop_path_rate=0.0)
MASKING = MaskingConfig(mask_ratio=0.6, prediction_subsampling=0.5)
N_PATCHES = 6 * 8


@pytest.fixture(scope="module")
def model() -> CAPI:
    torch.manual_seed(0)
    model = CAPI(SHAPE, ClusteringConfig(n_prototypes=8)).init_weights().eval()
    # Its own student, by which a mistake for the moving average would be seen.
    torch.nn.init.normal_(model.student.head.last_layer.weight_v)
    return model


def pictures(n: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, 24, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_as_many_patches_are_seen_and_asked_for_as_in_training(model):
    for answer in ask(model, pictures(), MASKING, seed=0):
        assert answer.visible.shape == answer.asked.shape == (6, 8)
        assert int(answer.visible.sum()) == N_PATCHES - int(N_PATCHES * 0.6)
        assert int(answer.asked.sum()) == int(int(N_PATCHES * 0.6) * 0.5)
        assert not (answer.visible & answer.asked).any()
        assert ((answer.student >= 0) == answer.asked).all()


def test_all_that_is_hidden_may_be_asked_for(model):
    few = ask(model, pictures(), MASKING, seed=0)
    for some, answer in zip(few, ask(model, pictures(), replace(MASKING, prediction_subsampling=1.0), 0), strict=True):
        assert torch.equal(answer.asked, ~answer.visible)
        # Questions do not see each other: the answers are the same.
        assert torch.equal(answer.student[some.asked], some.student[some.asked])


def test_answers_are_the_students_and_clusters_the_teachers(model):
    images = normalize_images(pictures())
    answers = ask(model, pictures(), MASKING, seed=3)
    with torch.no_grad():
        features = model.student_ema.backbone(images)[2]
        z = features / features.norm(dim=-1, keepdim=True) @ model.teacher["head"].layer.weight.T
        clusters = (z + model.teacher["head"].layer.bias).argmax(-1)
        for i, answer in enumerate(answers):
            assert torch.equal(answer.teacher, clusters[i])
            visible, asked = (x.flatten().nonzero()[:, 0] for x in (answer.visible, answer.asked))
            both = Masks(visible, asked, (len(visible),), (len(asked),))
            assert torch.equal(answer.student[answer.asked], model.student(images[i, None], both).argmax(-1))
            agreeing = (answer.student == answer.teacher) & answer.asked
            assert torch.equal(answer.agreeing, agreeing)
    assert len({answer.visible for answer in answers}) == 3


def test_a_seed_draws_other_masks_and_the_same_one_the_same(model):
    one, same, other = (ask(model, pictures(1), MASKING, seed)[0].visible for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_sizes_that_cannot_be_masked(model):
    with pytest.raises(ValueError, match=r"multiples of the patch size 4, got \(24, 30\)"):
        ask(model, pictures()[..., :30], MASKING, 0)
    with pytest.raises(ValueError, match="at least one predicted patch"):
        ask(model, pictures()[..., :4, :4], MASKING, 0)


@pytest.fixture
def panels(monkeypatch):
    """One picture, its four panels and the note: a row is seen, of the rest half is asked, of which a part agrees."""
    visible, asked = torch.zeros(2, 4, 6, dtype=torch.bool)
    visible[0] = True
    asked[2:] = True
    teacher = torch.arange(24).view(4, 6) % 5
    student = torch.where(asked, teacher, -1)
    student[3, :4] = 7
    drawn = []

    def note_them(title, note, groups):
        drawn.extend([groups[0], note])
        return sheet(title, note, groups)

    monkeypatch.setattr(module, "sheet", note_them)
    picture = torch.full((1, 3, 16, 24), 77, dtype=torch.uint8)
    draw_masks(picture, [Answers(visible, asked, teacher, student)], names=["a.png"])
    return drawn


def test_titles_count_what_is_seen_asked_and_agreed_on(panels):
    group, note = panels
    captions = [panel.caption for panel in group]
    assert captions == ["a.png, 24 patches", "sees 6, is asked for 12", "the teacher's clusters", "answers: 8 agree"]
    assert "agrees at 8 of 12 positions (67 %; the commonest cluster everywhere: 25 %)" in note


def patches_of(panel) -> np.ndarray:
    """[rows, columns, side, side, 3]"""
    side = panel.pixels.shape[0] // 4
    return panel.pixels.reshape(4, side, 6, side, 3).swapaxes(1, 2)


def test_hidden_patches_are_grey_and_asked_ones_framed(panels):
    _, seen, *_ = panels[0]
    patches = patches_of(seen)
    assert (patches[0] == 77).all()
    assert (patches[1] == 150).all()
    assert (patches[2:, :, 1, 5] == 255).all()
    assert (patches[2:, :, 12, 12] == 150).all()


def test_clusters_have_their_colours_and_other_answers_a_cross(panels):
    _, _, teacher, student = map(patches_of, panels[0])
    assert (teacher[:2] == 238).all()
    assert (student[:2] == 238).all()
    assert (teacher[2:, :, 2, 2] == student[2:, :, 2, 2]).all(axis=-1).sum() == 8
    crossed = (student == 0).all(axis=-1).any(axis=(2, 3))
    assert crossed[3, :4].all()
    assert crossed.sum() == 4
    assert not (teacher == 0).all(axis=-1).any()
