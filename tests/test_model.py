import copy
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from capi import transformer
from capi.casting import cast_weights
from capi.config import ClusteringConfig, MaskingConfig, ModelConfig
from capi.drop_path import Branches, DropPath, draw, received, send, subsets
from capi.images import IMAGENET_MEAN, IMAGENET_STD, resized
from capi.masking import Masks, cumulative_lengths, sample_masks
from capi.model import (
    CAPI,
    Backbone,
    PatchEmbed,
    normalize_images,
)
from capi.transformer import Residual, pack
from capi_kernels import rotary_tables

SHAPE = ModelConfig(
    patch_size=4, embed_dim=32, num_heads=2, encoder_depth=2, predictor_depth=2, n_registers=4, drop_path_rate=0.0
)
OTHER = replace(SHAPE, predictor_dim=48, predictor_heads=3, scale_registers=False, out_layer=1)
RAGGED = MaskingConfig(mask_ratio=(0.3, 0.8), prediction_subsampling=0.4)


def make_backbone(config: ModelConfig = SHAPE) -> Backbone:
    torch.manual_seed(0)
    return Backbone(config).init_weights().double()


def make_batch(n: int = 5, rows: int = 5, columns: int = 7, masking: MaskingConfig = RAGGED):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(n, 3, 4 * rows, 4 * columns, generator=generator, dtype=torch.float64)
    return images, sample_masks(masking, (rows, columns), [np.random.default_rng((7, i)) for i in range(n)])


def masks_of_image(masks: Masks, image: int, n_tokens: int) -> Masks:
    visible = masks.visible_indices.split(masks.visible_counts)[image] - image * n_tokens
    predicted = masks.predict_indices.split(masks.predict_counts)[image] - image * n_tokens
    return Masks(visible, predicted, (len(visible),), (len(predicted),))


@pytest.mark.parametrize("config", [SHAPE, OTHER])
def test_packed_images_of_different_lengths_equal_each_image_alone(config) -> None:
    backbone, (images, masks) = make_backbone(config), make_batch()
    assert len(set(masks.visible_counts)) > 1
    together = backbone.predict(images, masks).split(masks.predict_counts)
    for image, predicted in enumerate(together):
        alone = backbone.predict(images[image : image + 1], masks_of_image(masks, image, 35))
        torch.testing.assert_close(predicted, alone, rtol=0, atol=1e-12)


def test_residual_branches_added_in_place_are_the_same_features() -> None:
    backbone, (images, masks) = make_backbone(), make_batch()
    for given in (None, masks):
        with torch.no_grad():
            expected, *_ = backbone.encode(images, given)
            backbone.encoder.in_place = True
            actual, *_ = backbone.encode(images, given)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
        with_gradients, *_ = backbone.encode(images, given)  # Whose x is needed for the backward pass.
        assert torch.equal(with_gradients, expected)
        backbone.encoder.in_place = False


def test_patches_are_padded_to_channels_of_a_fast_product() -> None:
    """A patch of 14 pixels has 588: the zeros change neither the embedding nor its gradients."""
    torch.manual_seed(0)
    layer = PatchEmbed(3, 8, kernel_size=14, stride=14).double()
    assert layer.cast(torch.float64)[0].shape == (8, 592)
    images = torch.randn(2, 3, 28, 42, dtype=torch.float64)
    upstream = torch.randn(2, 8, 2, 3, dtype=torch.float64)
    plain = torch.nn.functional.conv2d(images, layer.weight, layer.bias, stride=14)
    expected = torch.autograd.grad(plain, layer.parameters(), upstream)
    out = layer(images).unflatten(0, (2, 2, 3)).permute(0, 3, 1, 2)
    torch.testing.assert_close(out, plain, rtol=0, atol=1e-12)
    for actual, gradient in zip(torch.autograd.grad(out, layer.parameters(), upstream), expected, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=0, atol=1e-11)


class CountsOperations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.of[op._schema.name.split("::")[1]] += 1
        return op(*args, **(kwargs or {}))


def test_many_images_of_different_lengths_take_as_many_operations_as_few() -> None:
    backbone, counts = make_backbone(), []
    for n in (4, 12):
        images, masks = make_batch(n)
        assert len(set(masks.visible_counts)) > 1
        assert len(set(masks.predict_counts)) > 1
        given = drop_path(0.3, backbone, n)
        backbone.predict(images, masks)  # Which keeps the coordinates of the grid.
        with CountsOperations() as operations:
            backbone.predict(images, masks, given).sum().backward()
        counts.append(operations.of.total())
    # Attention takes the images one by one on a CPU, within an operation.
    assert counts[0] == counts[1]


def test_coordinates_of_a_grid_are_made_once() -> None:
    """Where they then lie; whatever the first use of them was, and in no state that is saved."""
    backbone, (images, masks) = make_backbone(), make_batch()
    expected, keys = backbone.predict(images, masks), backbone.state_dict().keys()
    fresh = make_backbone()
    with FakeTensorMode():
        fresh._coordinates((5, 7), images.device)
    with torch.inference_mode():
        fresh(images)
    (kept,) = fresh._kept.values()
    assert not kept.patches.is_inference()
    copied = copy.deepcopy(fresh)
    for model in (fresh, copied):
        with CountsOperations() as operations:
            out = model.predict(images, masks)
        out.sum().backward()
        assert torch.equal(out, expected)
        assert "linspace" not in operations.of
        assert model.state_dict().keys() == keys
    assert fresh._kept[(5, 7), images.device] is kept
    fresh(images[..., :16])
    assert len(fresh._kept) == 2
    # Of another device others.
    fresh.to("meta").encode(images.to("meta"))
    assert {x.device.type for x in fresh._kept[(5, 7), torch.device("meta")]} == {"meta"}


def test_layers_share_the_tables_of_images_that_share_their_coordinates() -> None:
    backbone, (images, masks) = make_backbone(), make_batch()
    assert backbone.encoder.have_equal_frequencies()
    for given, shared in ((None, 1), (masks, 2)):
        results, cosines = [], []
        for shares in (False, True):
            backbone.encoder.shares_tables = shares
            with CountsOperations() as operations:
                results.append(backbone.encode(images, given)[0])
            cosines.append(operations.of["cos"])
        torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-12)
        assert cosines == [2, shared]
    backbone.encoder.blocks[1].residual1.fn.rope.freqs[0, 0] += 1
    assert not backbone.encoder.have_equal_frequencies()


def test_a_prediction_depends_on_no_other_query() -> None:
    backbone, (images, masks) = make_backbone(), make_batch()
    everything = backbone.predict(images, masks)
    first = torch.tensor([sum(masks.predict_counts[:i]) for i in range(len(masks.predict_counts))])
    one_each = Masks(masks.visible_indices, masks.predict_indices[first], masks.visible_counts, (1,) * len(first))
    torch.testing.assert_close(backbone.predict(images, one_each), everything[first], rtol=0, atol=1e-12)


def test_masked_pixels_are_not_seen() -> None:
    backbone, (images, masks) = make_backbone(), make_batch()
    visible = torch.zeros(5 * 35, dtype=torch.bool)
    visible[masks.visible_indices] = True
    pixels = visible.view(5, 1, 5, 7).repeat_interleave(4, 2).repeat_interleave(4, 3)
    scrambled = torch.where(pixels, images, torch.randn_like(images))
    assert torch.equal(backbone.predict(scrambled, masks), backbone.predict(images, masks))


def test_evaluation_forward_on_a_grid_that_is_not_square() -> None:
    backbone, (images, _) = make_backbone(), make_batch()
    global_vector, registers, feature_map = backbone(images)
    assert global_vector.shape == (5, 32)
    assert registers.shape == (5, 4, 32)
    assert feature_map.shape == (5, 5, 7, 32)
    encoded, packed, counts = backbone.encode(images)
    assert counts == (39,) * 5
    assert packed.max_seqlen == 39
    torch.testing.assert_close(encoded.view(5, 39, 32)[:, 4:].reshape(feature_map.shape), feature_map)


def test_image_sides_must_be_multiples_of_the_patch() -> None:
    with pytest.raises(ValueError, match=r"multiples of the patch size 4, got \(1, 3, 18, 16\)"):
        make_backbone()(torch.zeros(1, 3, 18, 16, dtype=torch.float64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "multiple of 4, got 32 / 3"),
        ({"num_heads": 16}, "multiple of 4, got 32 / 16"),
        ({"n_registers": 6}, "n_registers must be a multiple of 4, got 6"),
        ({"n_registers": -4}, "n_registers must not be negative, got -4"),
        ({"encoder_depth": 0}, "must be at least 1, got 0 and 2"),
        ({"predictor_dim": 36}, "width / heads of the predictor must be a multiple of 4, got 36 / 2"),
        ({"predictor_heads": 5}, "width / heads of the predictor must be a multiple of 4, got 32 / 5"),
        ({"predictor_heads": 0}, "width / heads of the predictor must be a multiple of 4, got 32 / 0"),
        ({"out_layer": 25}, "model.out_layer must lie from -25 to 24, got 25"),
        ({"out_layer": -26}, "model.out_layer must lie from -25 to 24, got -26"),
    ],
)
def test_impossible_shapes(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        Backbone(ModelConfig(**({"patch_size": 4, "embed_dim": 32, "predictor_depth": 2, "num_heads": 2} | change)))


def test_no_registers_at_all() -> None:
    backbone = make_backbone(ModelConfig(**{**SHAPE.__dict__, "n_registers": 0}))
    images, masks = make_batch()
    assert backbone.predict(images, masks).isfinite().all()
    assert backbone(images)[1].shape == (5, 0, 32)


def test_registers_that_lie_at_one_point_may_be_of_any_number() -> None:
    """In the first corner of the visible patches, or of the image."""
    images, masks = make_batch()
    visible = masks.visible_indices % 35
    corners = [(int((x // 7).min()) / 4, int((x % 7).min()) / 6) for x in visible.split(masks.visible_counts)]
    assert len(set(corners)) > 1
    for scaled in (True, False):
        config = replace(SHAPE, n_registers=3, register_coordinates="zeros", scale_registers=scaled)
        _, packed, counts = make_backbone(config).encode(images, masks)
        for coords, corner in zip(packed.coords.split(counts), corners, strict=True):
            expected = torch.tensor(corner if scaled else (0.0, 0.0)).expand(3, 2)
            torch.testing.assert_close(coords[:3], expected)


def test_the_teacher_clusters_the_layer_that_is_asked_for() -> None:
    """As it stands, under the final norm, whatever the blocks behind it do; and features are of that layer."""
    images, _ = make_batch()
    torch.manual_seed(0)
    model = CAPI(replace(SHAPE, out_layer=-2), ClusteringConfig(n_prototypes=8)).init_weights().double()
    backbone = model.student_ema.backbone
    features = model.teacher_features(images)
    global_vector, registers, feature_map = backbone(images)
    torch.testing.assert_close(feature_map.flatten(1, 2), features)
    torch.testing.assert_close(backbone.forward_features(images), torch.cat([registers, features], 1))
    outputs = []
    backbone.encoder.blocks[0].register_forward_hook(lambda _, __, out: outputs.append(out))
    backbone.encode(images)
    expected = torch.nn.functional.rms_norm(outputs[0], (32,), eps=transformer.NORM_EPS).unflatten(0, (5, -1))
    torch.testing.assert_close(torch.cat([registers, features], 1), expected)
    with torch.no_grad():
        backbone.encoder.blocks[1].residual2.fn.fc2.weight.mul_(2)
    assert torch.equal(model.teacher_features(images), features)
    assert not torch.equal(backbone(images)[0], global_vector)  # The predictor reads the last.


def drop_path(rate: float, backbone: Backbone, n_images: int, device: str | torch.device = "cpu") -> DropPath:
    depths = len(backbone.encoder.blocks), len(backbone.decoder.blocks)
    drawn = [draw(rate, depths, n_images, np.random.default_rng(0))]
    (result,) = received(send(drawn, [n_images], torch.device(device)), drawn, [n_images])
    return result


def branches(images: list[list[int]], n_images: int) -> Branches:
    nothing = np.empty((0, 0), dtype=np.int64)
    drawn = [(np.array(images), nothing)]
    (result,) = received(send(drawn, [n_images], torch.device("cpu")), drawn, [n_images])
    return result.encoder


def test_drop_path_computes_the_kept_images_alone_and_weighs_them_up() -> None:
    """One block by hand: x + b/n_keep * residual on the drawn images, x elsewhere."""
    backbone, (images, masks) = make_backbone(), make_batch()
    x, packed, counts = backbone.encode(images, masks)
    assert len(set(counts)) > 1
    block = backbone.encoder.blocks[0]
    n_tokens, weight = [0, *np.cumsum(counts)], 5 / 3
    drawn, _ = draw(0.4, (1, 1), 5, np.random.default_rng(3))
    first, second = drawn
    assert set(first) != set(second)
    expected = []
    for image in range(5):
        here = slice(n_tokens[image], n_tokens[image + 1])
        tokens = x[here]
        if image in first:
            attention, alone = block.residual1, pack((counts[image],), packed.coords[here])
            tokens = tokens + weight * attention.fn(attention.norm(tokens), alone)
        if image in second:
            tokens = tokens + weight * block.residual2.fn(block.residual2.norm(tokens))
        expected.append(tokens)
    attention, mlp = subsets(branches(drawn.tolist(), 5), counts, packed.cu_seqlens)
    actual = block(x, packed, attention_subset=attention, mlp_subset=mlp)
    torch.testing.assert_close(actual, torch.cat(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("counts", [(3, 3, 3), (3, 0, 2)])
def test_subsets_of_tokens(counts) -> None:
    (subset,) = subsets(branches([[2, 0]], 3), counts, cumulative_lengths(counts))
    starts = [0, *np.cumsum(counts)]
    tokens = [*range(starts[2], starts[3]), *range(starts[0], starts[1])]
    assert subset.tokens.tolist() == tokens
    assert subset.place.tolist() == [tokens.index(t) if t in tokens else -1 for t in range(starts[3])]
    assert subset.cu_seqlens.tolist() == [0, counts[2], counts[2] + counts[0]]
    assert subset.cu_seqlens.dtype == torch.int32
    assert subset.weight == 3 / 2
    subset, other = subsets(branches([[2, 0], [1, 2]], 3), counts, cumulative_lengths(counts))
    assert other.tokens.tolist() == [*range(starts[1], starts[2]), *range(starts[2], starts[3])]
    for one, another in ((subset.place, other.place), (subset.cu_seqlens, other.cu_seqlens)):
        assert (another.data_ptr() - one.data_ptr()) % 16 == 0


def test_gradients_of_a_subset_are_those_of_plain_indexing() -> None:
    x = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    (subset,) = subsets(branches([[2, 0]], 3), (3, 3, 2), cumulative_lengths((3, 3, 2)))
    linear = torch.nn.Linear(4, 4).double()
    actual = Residual(4, linear).double()
    plain = x.index_add(0, subset.tokens, linear(actual.norm(x[subset.tokens])), alpha=1.5)
    weights = torch.randn(8, 4, dtype=torch.float64)
    parameters = (x, *actual.parameters())
    out = actual(x, subset)
    torch.testing.assert_close(out, plain, rtol=0, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad((out * weights).sum(), parameters),
        torch.autograd.grad((plain * weights).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_drop_path_of_the_predictor_keeps_queries_with_their_own_image() -> None:
    """With a rate so small that every image is kept, in shuffled order, nothing may change."""
    for masking in (RAGGED, MaskingConfig(mask_ratio=0.65, prediction_subsampling=0.4)):
        backbone, (images, masks) = make_backbone(), make_batch(masking=masking)
        shuffled = drop_path(0.0, backbone, 5)
        torch.testing.assert_close(
            backbone.predict(images, masks, shuffled), backbone.predict(images, masks), rtol=0, atol=1e-12
        )


def test_every_branch_draws_its_own_images_and_the_context_follows_the_queries() -> None:
    backbone, (images, masks) = make_backbone(), make_batch(n=16)
    images_of: list[tuple[int, ...]] = []

    def record(block, arguments) -> None:
        _, packed, context, context_packed, attention, of_context, mlp, *_ = arguments
        starts = [(attention, packed), (mlp, packed)] + ([] if context is None else [(of_context, context_packed)])
        drawn = [
            tuple((torch.searchsorted(layout.cu_seqlens, subset.tokens, right=True) - 1).unique().tolist())
            for subset, layout in starts
        ]
        if context is not None:
            assert drawn.pop() == drawn[0]
        images_of.extend(drawn)

    for block in (*backbone.encoder.blocks, *backbone.decoder.blocks):
        block.register_forward_pre_hook(record)
    backbone.predict(images, masks, drop_path(0.5, backbone, 16))
    assert len(images_of) == len(set(images_of)) == 8
    assert {len(branch) for branch in images_of} == {8}


def test_drop_path_counts() -> None:
    for n_images, kept in [(512, 409), (5, 4), (2, 1), (1, 1)]:
        images, of_predictor = draw(0.2, (2, 1), n_images, np.random.default_rng(0))
        assert images.shape == (4, kept)
        assert of_predictor.shape == (2, kept)
        assert all(len(set(branch)) == kept for branch in images.tolist())


@pytest.mark.parametrize(("queries", "last"), [(1, True), (8, True), (41, True), (42, False), (166, False)])
def test_values_come_last_where_that_takes_fewer_flop(queries, last) -> None:
    """A ViT-L: 16 heads, 1024 channels, 106 keys."""

    assert transformer._values_come_last((queries,) * 3, (106,) * 3, 16, 1024, 1024) is last
    # Of a narrower encoder the context costs less to sum.
    assert transformer._values_come_last((queries,) * 3, (106,) * 3, 16, 1024, 256) is (queries < 48)
    for ragged in (((queries, queries + 1), (106, 106)), ((queries, queries), (106, 105))):
        assert not transformer._values_come_last(*ragged, 16, 1024, 1024)


@pytest.mark.parametrize("config", [SHAPE, OTHER])
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_values_last_are_values_first(rate, config, monkeypatch) -> None:
    """Predictions and all gradients, drop-path included; and so where a product reads more rows than there are keys."""
    backbone, (images, masks) = make_backbone(config), make_batch(masking=MaskingConfig(prediction_subsampling=0.1))
    results = []
    for last, more in ((False, 0), (True, 0), (True, 3)):
        monkeypatch.setattr(transformer, "_values_come_last", lambda *_, last=last: last)
        monkeypatch.setattr(transformer, "_row", lambda keys, _, more=more: keys + more)
        backbone.zero_grad()
        out = backbone.predict(images, masks, drop_path(rate, backbone, 5))
        out.square().sum().backward()
        results.append({name: p.grad for name, p in backbone.named_parameters() if p.grad is not None} | {"out": out})
    for name, x in results[0].items():
        for other in results[1:]:
            torch.testing.assert_close(other[name], x, rtol=0, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_rows_of_keys_are_those_of_fast_products_on_a_gpu() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert [transformer._row(keys, gpu) for keys in (106, 112, 113)] == [112, 112, 128]
    assert transformer._row(106, cpu) == 106


def test_values_projected_last_are_not_copied_on_a_gpu() -> None:
    """Neither they, nor the sums that they are made of, nor gradients of either; the context is, as it is gathered."""
    n, queries, keys, meta = 5, 2, 21, torch.device("meta")
    backbone = make_backbone().to(meta)
    given = [torch.empty(n * tokens, 32, device=meta, dtype=torch.double) for tokens in (queries, keys)]
    x, context = (tokens.requires_grad_() for tokens in given)
    of = [(pack((tokens,) * n, torch.empty(n * tokens, 2, device=meta)), (tokens,) * n) for tokens in (queries, keys)]
    chosen = drop_path(0.4, backbone, n, meta).predictor
    with CountsOperations() as operations:
        backbone.decoder(x, *of[0], context, *of[1], chosen).sum().backward()
    assert not {"clone", "copy_"} & operations.of.keys()


def test_initial_weights() -> None:
    torch.manual_seed(0)
    config = ModelConfig(patch_size=8, embed_dim=128, num_heads=4, encoder_depth=1, predictor_depth=1)
    model = CAPI(config, ClusteringConfig(n_prototypes=512)).init_weights()
    state = model.state_dict()
    block = "student.backbone.encoder.blocks.0."
    for name, fans in [("residual1.fn.q_proj", 128 + 128), ("residual2.fn.fc1", 128 + 512)]:
        bound, weight = math.sqrt(6 / fans), state[f"{block}{name}.weight"]
        assert 0.99 * bound < float(weight.abs().max()) <= bound
        assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    bound = math.sqrt(6 / (128 + 3 * 64))  # xavier of the patches' linear map, not of the convolution
    assert 0.99 * bound < float(state["student.backbone.patch_embed.weight"].abs().max()) <= bound
    assert float(state["student.backbone.patch_embed.bias"].abs().max()) <= 1 / math.sqrt(3 * 64)
    assert float(state["student.backbone.patch_embed.bias"].std()) > 0
    assert float(state["student.backbone.registers"].std()) == pytest.approx(0.02, rel=0.1)
    assert float(state["student.backbone.mask_token"].std()) == pytest.approx(0.02, rel=0.25)
    assert (state[f"{block}residual1.norm.weight"] == 1).all()
    assert (state["student.head.last_layer.weight_g"] == 1).all()
    assert float(state["student.head.last_layer.weight_v"].std()) == pytest.approx(0.02, rel=0.02)
    assert float(state["teacher.head.layer.weight"].std()) == pytest.approx(1, rel=0.02)
    assert (state["teacher.head.layer.bias"] == 0).all()
    for name, tensor in model.student.state_dict().items():
        assert torch.equal(model.student_ema.state_dict()[name], tensor)
    freqs = state[f"{block}residual1.fn.rope.freqs"]
    assert freqs.shape == (2, 32)
    assert (freqs[0, 16:] == 0).all()
    assert (freqs[1, :16] == 0).all()
    assert torch.equal(freqs[0, :8], freqs[0, 8:16])
    assert torch.equal(freqs[0, :16], freqs[1, 16:])
    assert float(freqs[0, 0]) == pytest.approx(2 * math.pi * 7)
    assert float(freqs[0, 7]) == pytest.approx(2 * math.pi * 7e-4, rel=1e-5)


def test_the_head_is_a_scaled_cosine() -> None:
    torch.manual_seed(0)
    head = CAPI(SHAPE, ClusteringConfig(n_prototypes=48)).init_weights().student.head.double()
    with torch.no_grad():
        head.last_layer.weight_g.uniform_(0.5, 2)
    x = torch.randn(6, 32, dtype=torch.float64)
    cosine = torch.cosine_similarity(x[:, None], head.last_layer.weight_v[None], dim=-1)
    torch.testing.assert_close(head(x), cosine * head.last_layer.weight_g[:, 0], rtol=1e-6, atol=1e-7)


def test_targets_come_in_the_order_of_the_predictions() -> None:
    torch.manual_seed(0)
    model = CAPI(SHAPE, ClusteringConfig(n_prototypes=20)).init_weights().double()
    images, masks = make_batch()
    features, head = model.teacher_features(images), model.teacher["head"]
    _, potentials = head(features)
    targets = head.targets(features, potentials, masks.predict_indices)
    order = torch.cat([part.flip(0) for part in torch.arange(len(masks.predict_indices)).split(masks.predict_counts)])
    reordered = head.targets(features, potentials, masks.predict_indices[order])
    torch.testing.assert_close(reordered, targets[order], rtol=0, atol=1e-12)
    assert (reordered - targets).abs().max() > 0.1
    torch.testing.assert_close(targets.sum(-1), torch.ones_like(targets[:, 0]))
    later = head.targets(features[2:], potentials, masks.predict_indices[-3:] - 2 * 35, first_image=2)
    torch.testing.assert_close(later, targets[-3:], rtol=0, atol=1e-12)


def test_bf16_compute_stays_near_fp32_and_forms_angles_in_fp32() -> None:
    torch.manual_seed(0)
    model = CAPI(SHAPE, ClusteringConfig(n_prototypes=20)).init_weights()
    images, masks = make_batch()
    images = images.float()
    with torch.no_grad():
        exact_features, exact_logits = model.teacher_features(images), model.student(images, masks)
        exact_loss, _ = model.teacher["head"](exact_features)
        with cast_weights(model, torch.bfloat16):
            features, logits = model.teacher_features(images), model.student(images, masks)
            loss, _ = model.teacher["head"](features)
        cos, _ = rotary_tables(torch.rand(9, 2), model.student.backbone.encoder.blocks[0].residual1.fn.rope.freqs)
    assert cos.dtype == torch.float32
    assert features.dtype == logits.dtype == torch.bfloat16
    assert 0 < float((features - exact_features).abs().max()) < 0.1
    assert float(loss) == pytest.approx(float(exact_loss), rel=0.05)
    assert float((logits - exact_logits).abs().max()) < 0.05
    assert torch.equal(model.student(images, masks), exact_logits)  # outside, the weights are as they were


def test_cast_weights_are_made_once_and_pass_their_gradients_on() -> None:
    """Two backwards through one cast accumulate in the parameters, in their own type, like two casts."""
    torch.manual_seed(0)
    model = CAPI(SHAPE, ClusteringConfig(n_prototypes=20)).init_weights()
    images, masks = make_batch()
    images = images.float()

    def backward() -> None:
        model.student(images, masks).float().square().sum().backward()

    with cast_weights(model.student, torch.bfloat16):
        block = model.student.backbone.encoder.blocks[0]
        before = block.residual2.fn.weights()
        backward()
        backward()
        assert all(x is y for x, y in zip(block.residual2.fn.weights(), before, strict=True))
    twice = {name: p.grad.clone() for name, p in model.student.named_parameters() if p.requires_grad}
    assert {grad.dtype for grad in twice.values()} == {torch.float32}
    model.student.zero_grad()
    for _ in range(2):
        with cast_weights(model.student, torch.bfloat16):
            backward()
    for name, grad in twice.items():
        assert grad.any(), name
        torch.testing.assert_close(model.student.get_parameter(name).grad, grad)


def test_images_are_normalised_to_imagenet_statistics() -> None:
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    normal = normalize_images(images)
    for channel in range(3):
        back = (normal[:, channel] * IMAGENET_STD[channel] + IMAGENET_MEAN[channel]) * 255
        torch.testing.assert_close(back, images[:, channel].float(), rtol=0, atol=1e-3)


def test_one_image_is_normalised_as_a_batch_is() -> None:
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(normalize_images(images[0]), normalize_images(images)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.int8])
def test_images_of_an_unknown_range_are_not_normalised(dtype) -> None:
    with pytest.raises(TypeError, match=f"must be a tensor of torch.uint8, with values from 0 to 255, got {dtype}"):
        normalize_images(torch.rand(2, 3, 4, 4).to(dtype))


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (2, 4, 4, 4), (2, 4, 4, 3), (1, 4, 4)])
def test_images_of_other_channels_are_not_normalised(shape) -> None:
    with pytest.raises(ValueError, match=r"must have the shape \[..., 3, height, width\], got \("):
        normalize_images(torch.zeros(shape, dtype=torch.uint8))


def test_bytes_are_normalised_on_the_way() -> None:
    torch.manual_seed(0)
    backbone = Backbone(SHAPE).init_weights()
    images = torch.randint(0, 256, (5, 3, 20, 28), dtype=torch.uint8)
    _, masks = make_batch()
    torch.testing.assert_close(backbone.predict(images, masks), backbone.predict(normalize_images(images), masks))
    torch.testing.assert_close(backbone(images)[2], backbone(normalize_images(images))[2])


@pytest.fixture
def encoder() -> Backbone:
    torch.manual_seed(0)
    return Backbone(SHAPE).init_weights().eval().requires_grad_(False)


def test_layers_are_those_of_the_blocks_with_the_final_norm(encoder) -> None:
    images, seen = torch.randn(2, 3, 12, 20), []
    encoder.encoder.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for block in encoder.encoder.blocks:
        block.register_forward_hook(lambda _, inputs, output: seen.append(output))
    last = encoder(images)
    global_vector, registers, maps = encoder(images, layers=[-1, 0, 1, -2])
    assert torch.equal(global_vector, last[0])
    for place, number in enumerate([2, 0, 1, 1]):
        tokens = torch.nn.functional.rms_norm(seen[number], (32,), eps=1e-5).unflatten(0, (2, -1))
        assert torch.equal(registers[place], tokens[:, :4])
        assert torch.equal(maps[place], tokens[:, 4:].unflatten(1, (3, 5)))
    assert torch.equal(maps[0], last[2])
    assert encoder(images, layers=[])[1:] == ([], [])
    for layers in ([3], [-4, 0]):
        with pytest.raises(ValueError, match=r"layers must be numbers from -3 to 2, got \["):
            encoder(images, layers=layers)


def test_tokens_as_timm_and_sizes_as_the_official_code_have_them(encoder) -> None:
    images = torch.randn(2, 3, 12, 20)
    tokens, (_, registers, feature_map) = encoder.forward_features(images), encoder(images)
    assert torch.equal(tokens[:, : encoder.num_prefix_tokens], registers)
    assert torch.equal(tokens[:, encoder.num_prefix_tokens :], feature_map.flatten(1, 2))
    assert (encoder.patch_size, encoder.embed_dim) == (4, 32) == (SHAPE.patch_size, tokens.shape[-1])


@pytest.mark.parametrize(
    ("size", "resize", "expected"),
    [
        ((13, 21), "multiple", (12, 20)),
        ((14, 3), "multiple", (16, 4)),  # a tie goes to the even number of patches
        ((1, 1), "multiple", (4, 4)),
        ((30, 50), 16, (16, 28)),
        ((50, 30), 16, (28, 16)),
        ((17, 17), 8, (8, 8)),
        ((30, 50), (20, 8), (20, 8)),
    ],
)
def test_images_of_any_size_are_resized(size, resize, expected, encoder) -> None:
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    fitted = resized(images, 4, resize)
    assert fitted.shape == (2, 3, *expected)
    assert fitted.dtype == torch.uint8
    with pytest.raises(ValueError, match=r"multiples of the patch size 4, got .*; with resize= they are made so$"):
        encoder(images)
    for one, other in zip(encoder(images, resize=resize), encoder(fitted), strict=True):
        assert torch.equal(one, other)
    half = resized(normalize_images(images).half(), 4, resize)
    assert half.dtype == torch.float16
    # Rounding to bytes and to half precision, and what overshoots the range of bytes.
    assert float((half - normalize_images(fitted)).abs().median()) < 0.02


def test_resizing_averages_and_leaves_what_fits(encoder) -> None:
    images = torch.rand(1, 3, 64, 64)
    assert resized(images, 4, (64, 64)) is images
    assert resized(images, 4, "multiple") is images
    noise = torch.randint(0, 256, (1, 3, 256, 256), dtype=torch.uint8)
    assert float(resized(noise, 4, 32).float().std()) < 20  # without antialiasing about 50
    edge = torch.tensor([0, 255], dtype=torch.uint8).repeat_interleave(8).expand(1, 3, 16, 16)
    left, right = resized(edge, 4, 32).split(16, dim=-1)
    assert int(left.max()) < 128 <= int(right.min())  # what overshoots does not wrap round
    for resize in (30, 0, -4, (16, 18), (0, 4)):
        with pytest.raises(ValueError, match=r"resize must be multiples of the patch size 4: .*; got"):
            encoder(images, resize=resize)
    with pytest.raises(ValueError, match="must have pixels"):
        encoder(images[..., :0], resize=16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by", ["to", "autocast"])
def test_half_precision_keeps_exact_frequencies(dtype, by, encoder) -> None:
    """Frequencies rounded to bfloat16 turn the last channels by a tenth of a radian."""
    images = torch.randint(0, 256, (2, 3, 48, 80), dtype=torch.uint8)
    expected, frequencies = encoder(images), encoder.encoder.blocks[0].residual1.fn.rope.freqs.clone()
    if by == "to":
        encoder.to(dtype)
        actual = encoder(images)
    else:
        with torch.autocast("cpu", dtype):
            actual = encoder(images)
    assert torch.equal(encoder.encoder.blocks[0].residual1.fn.rope.freqs, frequencies)
    for low, exact in zip(actual, expected, strict=True):
        assert low.dtype == dtype
        error = (low.float() - exact).abs().max() / exact.abs().max()
        assert error < 4 * torch.finfo(dtype).eps, error
    assert encoder.double().encoder.blocks[0].residual1.fn.rope.freqs.dtype == torch.float64
