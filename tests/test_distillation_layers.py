"""The notation of layer pairs, features brought to one shape, and projectors between widths."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models.gpt import GPT
from models.resnet import ResNet
from models.vit import ViT
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_accel.distillation.forward_recorder import ForwardRecorder
from lightning_accel.distillation.layers import Pair, pairs
from lightning_accel.distillation.projector import (
    LAYOUTS,
    Embedding,
    Projector,
    align,
    from_spec,
    layout_of,
    make_projector,
    narrowed,
    spec,
)
from lightning_accel.errors import NoEffect
from lightning_accel.surgery import Select, follow


def chain(depth: int) -> nn.Module:
    """A model with `depth` blocks of two layers, a stem and a head."""
    model = nn.Module()
    model.stem = nn.Linear(2, 2)
    model.blocks = nn.Sequential(
        *(nn.ModuleDict({"fc": nn.Linear(2, 2), "act": nn.ReLU()}) for _ in range(depth))
    )
    model.head = nn.Linear(2, 2)
    return model


def plain(found: list[Pair]) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in found]


class TestNotation:
    @pytest.mark.parametrize(
        ("notation", "wanted"),
        [
            ({"stem": "head"}, [("stem", "head")]),
            ({"stem": "head", "head": "stem"}, [("stem", "head"), ("head", "stem")]),
            ("stem: head", [("stem", "head")]),
            ("stem:head,blocks.0 : blocks.1", [("stem", "head"), ("blocks.0", "blocks.1")]),
            ("stem, head,", [("stem", "stem"), ("head", "head")]),
            ("head", [("head", "head")]),
            (["stem", "blocks.0: head"], [("stem", "stem"), ("blocks.0", "head")]),
            ([{"stem": "head"}, "head"], [("stem", "head"), ("head", "head")]),
            (("stem", "head"), [("stem", "head")]),
            ([("stem", "head"), Pair("head", "stem")], [("stem", "head"), ("head", "stem")]),
            ({"stem@input": "head@input"}, [("stem@input", "head@input")]),
            (["stem", "stem: stem"], [("stem", "stem")]),
        ],
    )
    def test_each_form_gives_the_pairs_that_it_reads_as(
        self, notation: Any, wanted: list[tuple[str, str]]
    ) -> None:
        assert plain(pairs(notation, chain(2), chain(2))) == wanted

    def test_what_was_found_is_a_notation_again(self) -> None:
        found = pairs("blocks.*", chain(2), chain(4))
        assert pairs(found, chain(2), chain(4)) == found

    def test_numbers_name_the_layers_of_a_sequential_as_yaml_writes_them(self) -> None:
        net = nn.Sequential(nn.ReLU(), nn.ReLU(), nn.ReLU())
        assert plain(pairs({0: 2}, net, net)) == [("0", "2")]

    def test_a_mapping_of_another_kind_is_read_like_a_dict(self) -> None:
        class Config(Mapping[str, str]):
            def __getitem__(self, key: str) -> str:
                return {"stem": "head"}[key]

            def __iter__(self) -> Any:
                return iter(["stem"])

            def __len__(self) -> int:
                return 1

        assert plain(pairs(Config(), chain(1), chain(1))) == [("stem", "head")]

    @pytest.mark.parametrize(
        "notation", [None, 3.5, True, {"stem": None}, [["stem", "head"]], b"stem", ("a", "b", "c")]
    )
    def test_what_is_no_notation_is_told(self, notation: Any) -> None:
        with pytest.raises(TypeError, match="pairs of layers are a mapping.*Found: .*Do: pass"):
            pairs(notation, chain(1), chain(1))

    @pytest.mark.parametrize("notation", ["", " , ", [], {}])
    def test_an_empty_notation_is_an_error(self, notation: Any) -> None:
        with pytest.raises(ValueError, match="no pairs of layers are named"):
            pairs(notation, chain(1), chain(1))

    @pytest.mark.parametrize("notation", ["stem:", ": head", {"": "head"}, ("stem", "@input")])
    def test_a_side_without_a_name_is_an_error(self, notation: Any) -> None:
        with pytest.raises(ValueError, match="a side of a pair needs a name"):
            pairs(notation, chain(1), chain(1))

    def test_three_sides_are_an_error(self) -> None:
        with pytest.raises(ValueError, match="two sides.*Found: 'a: b: c'"):
            pairs("a: b: c", chain(1), chain(1))


class TestGlobs:
    def test_a_glob_means_direct_children_and_nothing_below(self) -> None:
        found = pairs("blocks.*", chain(3), chain(3))
        assert plain(found) == [(f"blocks.{i}", f"blocks.{i}") for i in range(3)]

    def test_a_glob_stands_for_one_part_of_a_name_anywhere(self) -> None:
        found = pairs({"blocks.*.fc": "blocks.*.act"}, chain(2), chain(2))
        assert plain(found) == [
            ("blocks.0.fc", "blocks.0.act"),
            ("blocks.1.fc", "blocks.1.act"),
        ]

    def test_layers_come_in_the_order_of_the_model_not_of_the_alphabet(self) -> None:
        found = pairs("blocks.*", chain(11), chain(11))
        assert [pair.student for pair in found] == [f"blocks.{i}" for i in range(11)]

    def test_a_choice_of_characters_works_too(self) -> None:
        found = pairs("blocks.[02]", chain(4), chain(4))
        assert [pair.student for pair in found] == ["blocks.0", "blocks.2"]

    def test_inputs_of_all_that_a_glob_finds(self) -> None:
        found = pairs("blocks.*@input: blocks.*", chain(2), chain(2))
        assert plain(found) == [("blocks.0@input", "blocks.0"), ("blocks.1@input", "blocks.1")]

    def test_half_the_depth_learns_from_every_second_layer(self) -> None:
        found = pairs("blocks.*", chain(3), chain(6))
        assert [pair.teacher for pair in found] == ["blocks.1", "blocks.3", "blocks.5"]

    def test_a_single_layer_learns_from_the_last(self) -> None:
        assert plain(pairs("stem: blocks.*", chain(1), chain(5))) == [("stem", "blocks.4")]

    @given(st.integers(1, 12), st.integers(0, 12))
    @settings(deadline=None, max_examples=40)
    def test_a_longer_teacher_is_sampled_evenly_and_last_meets_last(
        self, short: int, more: int
    ) -> None:
        ours, theirs = (
            nn.Sequential(*(nn.Identity() for _ in range(n))) for n in (short, short + more)
        )
        found = [int(pair.teacher) for pair in pairs("*", ours, theirs)]
        assert found == [math.ceil((i + 1) * (short + more) / short) - 1 for i in range(short)]
        assert found[-1] == short + more - 1 and found == sorted(set(found))
        gaps = [b - a for a, b in zip([-1, *found], found, strict=False)]
        assert max(gaps) - min(gaps) <= 1

    def test_a_longer_student_is_an_error_that_shows_both(self) -> None:
        with pytest.raises(ValueError, match=r"more layers in the student.*3 \(blocks.0, .*2 \("):
            pairs("blocks.*", chain(3), chain(2))


class TestSelections:
    def test_a_selection_by_class_works_on_both_sides(self) -> None:
        found = pairs(Select(types=("Block",)), ResNet((4, 8), depth=1), ResNet((4, 8), depth=2))
        assert plain(found) == [("blocks.0", "blocks.1"), ("blocks.1", "blocks.3")]

    def test_each_side_may_have_its_own(self) -> None:
        notation = (Select(types=("Block",)), Select("blocks.*"))
        found = pairs(notation, ResNet((4,), depth=2), ViT(depth=4, dim=8))
        assert plain(found) == [("blocks.0", "blocks.1"), ("blocks.1", "blocks.3")]

    def test_a_selection_may_stand_beside_a_name(self) -> None:
        found = pairs({"stem": Select("head")}, chain(1), chain(1))
        assert plain(found) == [("stem", "head")]

    def test_only_the_outermost_of_what_is_chosen_counts(self) -> None:
        assert plain(pairs(Select("blocks"), chain(2), chain(2))) == [("blocks", "blocks")]
        found = pairs(Select("blocks.*"), chain(2), chain(2))
        assert [pair.student for pair in found] == ["blocks.0", "blocks.1"]

    def test_choosing_everything_never_means_the_model_itself(self) -> None:
        found = pairs(Select(), chain(1), chain(1))
        assert [pair.student for pair in found] == ["stem", "blocks", "head"]

    def test_layers_at_several_depths_may_be_chosen_by_class(self) -> None:
        found = pairs(Select(types=(nn.Linear,)), chain(1), chain(1))
        assert [pair.student for pair in found] == ["stem", "blocks.0.fc", "head"]


class TestNothingFound:
    @pytest.mark.parametrize("notation", ["stemm", "blocks.*.conv", Select("no.such")])
    def test_the_error_says_on_which_side_and_what_there_is(self, notation: Any) -> None:
        with pytest.raises(
            NoEffect, match=r"no layer of the student.*Found: Module with .*(stem|blocks\.0)"
        ):
            pairs(notation, chain(1), chain(1))
        with pytest.raises(NoEffect, match="no layer of the teacher"):
            pairs(("stem", notation), chain(1), chain(1))

    def test_close_names_come_first(self) -> None:
        with pytest.raises(NoEffect, match=r"close to it blocks.0.fc, blocks.1.fc"):
            pairs("fc", chain(2), chain(2))
        with pytest.raises(NoEffect, match=r"close to it stem"):
            pairs("stme", chain(2), chain(2))

    def test_a_model_without_layers_is_said_to_be_one(self) -> None:
        with pytest.raises(NoEffect, match="Linear with no layers"):
            pairs("fc", nn.Linear(1, 1), chain(1))

    def test_a_long_list_is_cut(self) -> None:
        with pytest.raises(NoEffect, match=r"with 0, 1, .*, 11 and 38 more\."):
            pairs("xyzzy", nn.Sequential(*(nn.ReLU() for _ in range(50))), chain(1))

    def test_a_glob_does_not_cross_dots(self) -> None:
        with pytest.raises(NoEffect):
            pairs("blocks*fc", chain(1), chain(1))


class TestCompiledAndShared:
    def test_names_inside_compiled_modules_go_without_the_wrapper(self) -> None:
        model = chain(2)
        model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
        assert any("_orig_mod" in name for name, _ in model.named_modules())
        compiled = torch.compile(model, backend="eager")
        names = ["blocks.0", "blocks.0.fc", "blocks.1.fc"]
        assert plain(pairs(names, compiled, model)) == [(name, name) for name in names]
        assert plain(pairs("blocks.*", compiled, chain(2))) == [
            (f"blocks.{i}", f"blocks.{i}") for i in range(2)
        ]
        assert plain(pairs("_orig_mod.stem: stem", compiled, model)) == [("stem", "stem")]

    def test_the_class_of_a_compiled_layer_is_its_own(self) -> None:
        model = chain(1)
        model.head = torch.compile(model.head, backend="eager")
        found = pairs(Select(types=("Linear",)), model, chain(1))
        assert [pair.student for pair in found] == ["stem", "blocks.0.fc", "head"]

    def test_a_shared_layer_answers_to_both_names_and_counts_once(self) -> None:
        model = nn.Module()
        model.first = nn.Linear(1, 1)
        model.second = model.first
        assert plain(pairs("second", model, model)) == [("second", "second")]
        assert [pair.student for pair in pairs("*", model, model)] == ["first"]


MAPS = [((8, 8), (4, 4)), ((7, 7), (4, 4)), ((5, 9), (3, 2)), ((8, 3), (8, 2))]


class TestLayouts:
    @pytest.mark.parametrize(
        ("shape", "wanted"),
        [((2, 3), "BD"), ((2, 3, 4), "BTD"), ((2, 3, 4, 5), "BCHW"), ((2,) * 5, "BCDHW")],
    )
    def test_dimensions_tell_the_layout(self, shape: tuple[int, ...], wanted: str) -> None:
        assert layout_of(torch.ones(shape)) == wanted

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_a_named_layout_is_taken_at_its_word(self, layout: str) -> None:
        assert layout_of(torch.ones((2,) * len(layout)), layout) == layout

    def test_an_unknown_layout_is_an_error_that_names_those_that_fit(self) -> None:
        with pytest.raises(ValueError, match="no layout 'NCHW'.*2x3x4x5.*one of BCHW, BHWC"):
            layout_of(torch.ones(2, 3, 4, 5), "NCHW")

    def test_a_layout_of_other_dimensions_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="no layout 'BCHW'.*2x3x4.*BTD, BCL"):
            layout_of(torch.ones(2, 3, 4), "BCHW")

    @pytest.mark.parametrize("shape", [(3,), (), (1,) * 6])
    def test_other_numbers_of_dimensions_are_an_error(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="no known layout.*tap a layer that gives one of BD"):
            layout_of(torch.ones(shape))


class TestAlign:
    def test_equal_shapes_pass_untouched(self) -> None:
        for shape in ((2, 3), (2, 4, 3), (2, 3, 4, 4), (2, 3, 2, 4, 4)):
            one, other = torch.randn(shape), torch.randn(shape)
            found = align(one, other)
            assert torch.equal(found[0], one) and torch.equal(found[1], other)

    @pytest.mark.parametrize(("large", "small"), MAPS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_the_larger_map_is_pooled_as_torch_pools(
        self, large: tuple[int, int], small: tuple[int, int], dtype: torch.dtype
    ) -> None:
        big, little = torch.randn(2, 3, *large, dtype=dtype), torch.randn(2, 5, *small, dtype=dtype)
        truth = F.adaptive_avg_pool2d(big.double(), small).to(dtype)
        close = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
        for flipped in (False, True):
            found = align(little, big)[::-1] if flipped else align(big, little)
            torch.testing.assert_close(found[0], truth, atol=close, rtol=close)
            assert torch.equal(found[1], little)

    def test_of_two_aspect_ratios_each_gives_way_along_one_dimension(self) -> None:
        wide, tall = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 8, 4)
        found = align(wide, tall)
        torch.testing.assert_close(found[0], wide.unflatten(3, (4, 2)).mean(4))
        torch.testing.assert_close(found[1], tall.unflatten(2, (4, 2)).mean(3))

    def test_volumes_are_pooled_as_torch_pools(self) -> None:
        big, little = torch.randn(2, 3, 5, 6, 7), torch.randn(2, 4, 2, 4, 3)
        found, kept = align(big, little)
        torch.testing.assert_close(found, F.adaptive_avg_pool3d(big, (2, 4, 3)))
        assert torch.equal(kept, little)

    def test_channels_last_maps_become_channels_first(self) -> None:
        one, other = torch.randn(2, 4, 5, 3), torch.randn(2, 7, 4, 5)
        found = align(one, other, student_layout="BHWC")
        assert torch.equal(found[0], one.permute(0, 3, 1, 2)) and torch.equal(found[1], other)
        again = align(other, one, teacher_layout="BHWC")
        assert torch.equal(again[1], one.permute(0, 3, 1, 2))

    def test_one_dimensional_maps_become_tokens(self) -> None:
        signal, tokens = torch.randn(2, 3, 12), torch.randn(2, 5, 8)
        found, kept = align(signal, tokens, student_layout="BCL")
        truth = F.adaptive_avg_pool1d(signal, 5).transpose(1, 2)
        torch.testing.assert_close(found, truth)
        assert torch.equal(kept, tokens)

    @pytest.mark.parametrize(
        ("shape", "dims"), [((2, 5, 3), (1,)), ((2, 3, 4, 5), (2, 3)), ((2, 3, 2, 4, 5), (2, 3, 4))]
    )
    def test_beside_a_vector_everything_is_averaged(
        self, shape: tuple[int, ...], dims: tuple[int, ...]
    ) -> None:
        feature, vector = torch.randn(shape), torch.randn(2, 9)
        for found, kept in (align(feature, vector), align(vector, feature)[::-1]):
            torch.testing.assert_close(found, feature.mean(dims))
            assert torch.equal(kept, vector)

    @pytest.mark.parametrize("extra", [1, 2, 5, 13, 16])
    def test_leading_class_and_register_tokens_of_the_longer_side_go(self, extra: int) -> None:
        long, short = torch.randn(2, 18 + extra, 3), torch.randn(2, 18, 4)
        for found, kept in (align(long, short), align(short, long)[::-1]):
            assert torch.equal(found, long[:, extra:]) and torch.equal(kept, short)

    @pytest.mark.parametrize(("long", "short"), [(40, 20), (57, 40), (30, 7), (13, 6)])
    def test_other_lengths_are_pooled_over_time(self, long: int, short: int) -> None:
        one, other = torch.randn(2, long, 3), torch.randn(2, short, 4)
        found, kept = align(one, other)
        truth = F.adaptive_avg_pool1d(one.transpose(1, 2), short).transpose(1, 2)
        torch.testing.assert_close(found, truth)
        assert torch.equal(kept, other)

    @pytest.mark.parametrize("extra", [0, 1])
    def test_patches_of_two_sizes_are_pooled_as_images(self, extra: int) -> None:
        fine, coarse = torch.randn(2, 3, 14, 14), torch.randn(2, 4, 7, 7)
        first = torch.full((2, extra, 3), 1e6), torch.full((2, extra, 4), 1e6)
        found, kept = align(
            torch.cat((first[0], fine.flatten(2).mT), 1),
            torch.cat((first[1], coarse.flatten(2).mT), 1),
        )
        truth = F.adaptive_avg_pool2d(fine, 7)
        torch.testing.assert_close(found.mT.unflatten(2, (7, 7)), truth)
        assert torch.equal(kept.mT.unflatten(2, (7, 7)), coarse)

    @pytest.mark.parametrize(
        ("grid", "extra"), [((6, 6), 0), ((6, 6), 1), ((6, 6), 5), ((12, 12), 5), ((12, 12), 16)]
    )
    def test_tokens_beside_a_map_are_laid_out_as_their_image(
        self, grid: tuple[int, int], extra: int
    ) -> None:
        image, other = torch.randn(2, 3, *grid), torch.randn(2, 4, 12, 12)
        tokens = torch.cat((torch.full((2, extra, 3), 1e6), image.flatten(2).mT), 1)
        for found, kept in (align(tokens, other), align(other, tokens)[::-1]):
            assert torch.equal(found, image)
            torch.testing.assert_close(kept, F.adaptive_avg_pool2d(other, grid))

    @pytest.mark.parametrize("extra", [0, 1, 5])
    def test_tokens_take_the_aspect_ratio_of_the_map(self, extra: int) -> None:
        image, other = torch.randn(2, 3, 14, 28), torch.randn(2, 4, 7, 14)
        tokens = torch.cat((torch.full((2, extra, 3), 1e6), image.flatten(2).mT), 1)
        found, kept = align(tokens, other)
        torch.testing.assert_close(found, F.adaptive_avg_pool2d(image, (7, 14)))
        assert torch.equal(kept, other)

    @pytest.mark.parametrize("extra", [0, 1])
    def test_a_square_of_tokens_meets_a_map_that_is_none(self, extra: int) -> None:
        image, other = torch.randn(2, 3, 14, 14), torch.randn(2, 4, 7, 10)
        tokens = torch.cat((torch.full((2, extra, 3), 1e6), image.flatten(2).mT), 1)
        found, kept = align(tokens, other)
        torch.testing.assert_close(found, F.adaptive_avg_pool2d(image, (7, 10)))
        assert torch.equal(kept, other)

    def test_tokens_beside_a_volume_are_laid_out_as_one(self) -> None:
        video, other = torch.randn(2, 3, 4, 6, 6), torch.randn(2, 4, 2, 3, 3)
        tokens = torch.cat((torch.full((2, 1, 3), 1e6), video.flatten(2).mT), 1)
        found, _ = align(tokens, other)
        torch.testing.assert_close(found, F.adaptive_avg_pool3d(video, (2, 3, 3)))

    @pytest.mark.parametrize("side", [0, 1])
    def test_gradients_reach_both_sides(self, side: int) -> None:
        shapes = [((2, 5, 3), (2, 3)), ((2, 17, 3), (2, 2, 2, 2)), ((2, 3, 5, 5), (2, 3, 3, 3))]
        shapes += [((2, 9, 2), (2, 4, 2)), ((2, 20, 2), (2, 18, 2)), ((2, 7, 2), (2, 3, 2))]
        for pair in shapes:
            one, other = (
                torch.randn(s, dtype=torch.float64, requires_grad=True)
                for s in (pair if not side else pair[::-1])
            )
            assert torch.autograd.gradcheck(align, (one, other))

    def test_pooling_has_a_gradient_where_only_deterministic_kernels_are_allowed(self) -> None:
        one, other = torch.randn(1, 2, 7, 7, requires_grad=True), torch.randn(1, 2, 4, 4)
        names = set()

        def walk(node: Any) -> None:
            if node is not None and node not in names:
                names.add(node)
                for following, _ in node.next_functions:
                    walk(following)

        walk(align(one, other)[0].grad_fn)
        assert not any("Pool" in node.name() for node in names)

    def test_different_batches_are_an_error(self) -> None:
        with pytest.raises(ValueError, match="different batches.*2 and 8 rows.*dimension 0"):
            align(torch.ones(2, 3), torch.ones(8, 3))

    def test_a_map_beside_a_volume_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="map and a volume.*2x3x4x4 and 2x3x2x4x4"):
            align(torch.ones(2, 3, 4, 4), torch.ones(2, 3, 2, 4, 4))

    def test_tokens_that_are_no_image_are_an_error(self) -> None:
        with pytest.raises(ValueError, match=r"tokens cannot be laid out.*1010 tokens.*4x4"):
            align(torch.ones(1, 1010, 2), torch.ones(1, 2, 4, 4))

    def test_whole_numbers_are_no_feature(self) -> None:
        with pytest.raises(ValueError, match=r"floating point.*torch.int64"):
            align(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.long))


class TestProjector:
    @pytest.mark.parametrize(("spatial", "convolve"), [(1, F.conv1d), (2, F.conv2d), (3, F.conv3d)])
    def test_on_maps_it_is_a_one_by_one_convolution(self, spatial: int, convolve: Any) -> None:
        projector, x = Projector(3, 5, "map"), torch.randn(2, 3, *(4,) * spatial)
        kernel = projector.weight.detach()[(...,) + (None,) * spatial]
        torch.testing.assert_close(projector(x).detach(), convolve(x, kernel))

    @pytest.mark.parametrize("shape", [(2, 3), (2, 7, 3)])
    def test_on_tokens_and_vectors_it_is_a_product(self, shape: tuple[int, ...]) -> None:
        projector, x = Projector(3, 5, "tokens"), torch.randn(shape)
        torch.testing.assert_close(projector(x), torch.einsum("...s,ts->...t", x, projector.weight))

    def test_it_is_one_matrix_without_bias(self) -> None:
        held = dict(Projector(3, 5, "map").named_parameters())
        assert {name: tuple(p.shape) for name, p in held.items()} == {"weight": (5, 3)}

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_it_takes_features_of_any_dtype(self, dtype: torch.dtype) -> None:
        x = torch.randn(2, 3).to(dtype)
        found = Projector(3, 5)(x)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        found.sum().backward()

    def test_weights_are_drawn_as_those_of_a_linear_layer(self) -> None:
        weight = Projector(100, 400).weight.detach()
        assert weight.abs().max() <= 0.1 and weight.abs().max() > 0.099
        assert abs(weight.mean()) < 1e-3 and abs(weight.std() - 0.2 / math.sqrt(12)) < 1e-3

    @pytest.mark.parametrize("make", [Projector, Embedding])
    def test_making_one_moves_no_random_state_and_depends_on_the_seed_alone(
        self, make: Any
    ) -> None:
        torch.manual_seed(1)
        before = torch.get_rng_state()
        one = make(4, 6, seed=3)
        assert torch.equal(before, torch.get_rng_state())
        torch.manual_seed(2)
        assert torch.equal(one.weight, make(4, 6, seed=3).weight)
        assert not torch.equal(one.weight, make(4, 6, seed=4).weight)

    def test_a_default_device_or_dtype_does_not_change_the_weights(self) -> None:
        truth = Projector(4, 6).weight
        with torch.device("meta"):
            assert torch.equal(Projector(4, 6).weight, truth)
        torch.set_default_dtype(torch.float64)
        try:
            assert torch.equal(Projector(4, 6).weight, truth)
        finally:
            torch.set_default_dtype(torch.float32)

    @pytest.mark.parametrize(
        ("student", "teacher", "wanted"),
        [
            ((2, 3), (2, 5), "Projector(3, 5, 'vector')"),
            ((2, 7, 3), (2, 7, 5), "Projector(3, 5, 'tokens')"),
            ((2, 3, 7, 5), (2, 5, 7, 5), "Projector(3, 5, 'map')"),
            ((2, 3, 7, 7, 9), (2, 5, 7, 7, 9), "Projector(3, 5, 'map')"),
            ((2, 3), (2, 3), "None"),
            ((2, 7, 3), (2, 7, 3), "None"),
            ((2, 3, 4, 4), (2, 3, 4, 4), "None"),
        ],
    )
    def test_two_aligned_features_tell_which_is_needed(
        self, student: tuple[int, ...], teacher: tuple[int, ...], wanted: str
    ) -> None:
        one, other = torch.randn(student), torch.randn(teacher)
        made = make_projector(one, other, seed=0)
        assert repr(made) == wanted
        if made is not None:
            assert made(one).shape == other.shape

    def test_it_is_made_in_the_precision_of_the_features_and_at_least_float32(self) -> None:
        for dtype, wanted in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
            one, other = torch.ones(2, 3, dtype=dtype), torch.ones(2, 5, dtype=dtype)
            made = make_projector(one, other)
            assert made is not None and made.weight.dtype == wanted
            assert Embedding.of(one).weight.dtype == wanted

    def test_features_that_are_not_aligned_are_an_error(self) -> None:
        with pytest.raises(ValueError, match="two aligned features.*2x3 and 2x4x3.*call `align`"):
            make_projector(torch.ones(2, 3), torch.ones(2, 4, 3))

    def test_an_unknown_kind_and_an_empty_width_are_errors(self) -> None:
        with pytest.raises(ValueError, match="unknown `kind`.*'conv'.*'map', 'tokens'"):
            Projector(3, 5, "conv")
        for make in (lambda: Projector(0, 5), lambda: Embedding(3, 0)):
            with pytest.raises(ValueError, match="widths are positive"):
                make()


class TestEmbedding:
    @pytest.mark.parametrize(
        ("shape", "layout", "dims"),
        [
            ((2, 3), None, ()),
            ((2, 7, 3), None, (1,)),
            ((2, 3, 4, 5), None, (2, 3)),
            ((2, 4, 5, 3), "BHWC", (1, 2)),
            ((2, 3, 9), "BCL", (2,)),
        ],
    )
    def test_it_is_the_average_and_then_a_linear_layer(
        self, shape: tuple[int, ...], layout: str | None, dims: tuple[int, ...]
    ) -> None:
        x = torch.randn(shape)
        embedding = Embedding.of(x, 6, layout=layout, seed=1)
        with torch.no_grad():
            embedding.bias.normal_()
        pooled = x.mean(dims) if dims else x
        torch.testing.assert_close(embedding(x), pooled @ embedding.weight.T + embedding.bias)

    def test_it_takes_half_precision(self) -> None:
        embedding = Embedding(3)
        assert embedding(torch.ones(2, 3, dtype=torch.bfloat16)).dtype == torch.float32
        assert embedding(torch.ones(2, 3)).shape == (2, 128)


class TestDescription:
    @pytest.mark.parametrize(
        "module",
        [Projector(3, 5, "map"), Projector(3, 5), Embedding(3, 4), Embedding(3, layout="BHWC")],
    )
    def test_a_module_comes_back_from_plain_data_and_its_weights(self, module: Any) -> None:
        described = spec(module)
        assert all(type(value) in (int, str) for value in described.values())
        again = from_spec(described)
        with torch.no_grad():
            module.weight.normal_()
        again.load_state_dict(module.state_dict())
        x = torch.randn(2, 3, 3, 3) if spec(module)["kind"] != "vector" else torch.randn(2, 3)
        assert torch.equal(again(x), module(x)) and spec(again) == described

    def test_it_tells_the_width_after_a_prune(self) -> None:
        projector = Projector(4, 6)
        narrowed(projector, torch.tensor([1, 3]))
        assert spec(projector)["student_width"] == 2

    @pytest.mark.parametrize("described", [{}, {"kind": "map"}, {"kind": "embedding", "depth": 3}])
    def test_another_description_is_an_error(self, described: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="not the description of a projector"):
            from_spec(described)


class TestNarrowing:
    def test_it_computes_what_the_wide_one_computes_of_the_kept_channels(self) -> None:
        x, kept = torch.randn(2, 6, 3, 3), torch.tensor([0, 2, 5])
        for module in (Projector(6, 4, "map"), Embedding(6, 4)):
            masked = torch.zeros_like(x)
            masked[:, kept] = x[:, kept]
            truth = module(masked)
            narrowed(module, kept)
            torch.testing.assert_close(module(x[:, kept]), truth)

    def test_training_goes_on_exactly_as_with_the_other_channels_at_zero(self) -> None:
        kept = torch.tensor([1, 2, 4])
        data = torch.randn(6, 8, 5, dtype=torch.float64)
        data[3:, :, [0, 3]] = 0
        wide, small = (Projector(5, 3).double() for _ in range(2))
        optimizers = [torch.optim.Adam(m.parameters(), lr=0.1) for m in (wide, small)]
        for step, x in enumerate(data):
            if step == 3:
                before = small.weight
                receipt = narrowed(small, kept, name="hint_0")
                follow(optimizers[1], receipt)
                assert small.weight is before
            for module, optimizer in zip((wide, small), optimizers, strict=True):
                optimizer.zero_grad()
                given = x[:, kept] if module is small and step >= 3 else x
                (module(given) - 1).square().sum().backward()
                optimizer.step()
        torch.testing.assert_close(small.weight, wide.weight[:, kept], rtol=0, atol=1e-12)

    def test_the_receipt_tells_the_names_and_what_stayed(self) -> None:
        projector, kept = Projector(5, 3), torch.tensor([1, 4])
        before = projector.weight.detach().clone()
        projector.weight.grad = 2 * before
        receipt = narrowed(projector, kept, name="heads.hint_0")
        assert [tuple(change) for change in receipt.changes] == [
            ("heads.hint_0.weight", "narrowed", "3x5", "3x2")
        ]
        (moved,) = receipt.moved
        assert moved.new is moved.old is projector.weight and moved.old_shape == (3, 5)
        assert torch.equal(moved.kept.take(before), before[:, [1, 4]])
        assert torch.equal(projector.weight.grad, 2 * before[:, [1, 4]])

    def test_a_live_graph_does_not_stop_it(self) -> None:
        projector = Projector(4, 3)
        old = projector(torch.ones(2, 4)).sum()
        receipt = narrowed(projector, torch.tensor([0, 1]))
        projector(torch.ones(2, 2)).sum().backward()
        assert projector.weight.grad is not None and projector.weight.grad.shape == (3, 2)
        assert receipt.moved[0].new is projector.weight and old.requires_grad

    def test_keeping_everything_changes_nothing(self) -> None:
        assert not narrowed(Projector(3, 2), torch.arange(3))

    @pytest.mark.parametrize(
        "kept",
        [[], [2, 1], [1, 1], [0, 4], [-1, 2], [0.0, 1.0], [True, False, True, False], [[0, 1]]],
    )
    def test_positions_that_make_no_sense_are_an_error(self, kept: list[Any]) -> None:
        projector = Projector(4, 2)
        with pytest.raises(ValueError, match="positions below 4 in increasing order"):
            narrowed(projector, torch.tensor(kept))
        assert projector.weight.shape == (2, 4)


def tapped(model: nn.Module, name: str, batch: Tensor) -> Tensor:
    tape = ForwardRecorder(model, [name])
    with tape.recording():
        model(batch)
    value = tape.records()[0].taps[name]
    tape.remove()
    return value


class TestBetweenFamilies:
    @pytest.mark.parametrize(
        ("student", "teacher", "notation", "shape"),
        [
            (ResNet((8, 16), depth=1), ViT(dim=24, depth=4), "blocks.*", (24, 4, 4)),
            (ViT(dim=12, depth=2), ResNet((8, 16), depth=2), "blocks.*", (16, 4, 4)),
            (ViT(dim=12, depth=2), ViT(dim=24, depth=4, patch_size=4), "blocks.*", (4, 24)),
            (ResNet((8, 16), depth=1), ResNet((8, 32), depth=2), "blocks.*", (32, 4, 4)),
            (ResNet((8, 16), depth=1), ViT(dim=24, depth=4), "head@input: norm", (24,)),
        ],
        ids=["cnn_of_vit", "vit_of_cnn", "vit_of_vit", "cnn_of_cnn", "vector_of_tokens"],
    )
    def test_a_hint_trains_the_student_and_leaves_the_teacher(
        self, student: nn.Module, teacher: nn.Module, notation: str, shape: tuple[int, ...]
    ) -> None:
        images = torch.randn(3, 1, 8, 8)
        pair = pairs(notation, student, teacher)[-1]
        one, other = align(
            tapped(student, pair.student, images), tapped(teacher, pair.teacher, images).detach()
        )
        projector = make_projector(one, other)
        assert projector is not None
        projected = projector(one)
        assert projected.shape == other.shape == (3, *shape)
        F.mse_loss(projected, other).backward()
        assert projector.weight.grad is not None and projector.weight.grad.abs().sum() > 0
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
        assert all(p.grad is None for p in teacher.parameters())

    def test_a_half_as_deep_gpt_learns_from_every_second_block(self) -> None:
        student = GPT(vocabulary=16, context=6, dim=8, depth=2, num_heads=2)
        teacher = GPT(vocabulary=16, context=6, dim=12, depth=4, num_heads=2)
        found = pairs("blocks.*, norm", student, teacher)
        assert plain(found) == [
            ("blocks.0", "blocks.1"),
            ("blocks.1", "blocks.3"),
            ("norm", "norm"),
        ]
        tokens = torch.randint(0, 16, (2, 6))
        one, other = (
            tapped(net, name, tokens)
            for net, name in zip((student, teacher), found[1], strict=True)
        )
        aligned = align(one, other)
        assert torch.equal(aligned[0], one) and torch.equal(aligned[1], other)
        projector = make_projector(*aligned)
        assert projector is not None and projector(one).shape == other.shape

    def test_a_convolution_sees_the_patches_where_they_lie(self) -> None:
        """A bright corner of the image is in the same corner of both aligned features."""
        vit, cnn = ViT(dim=8, depth=1), ResNet((4,), depth=1)
        with torch.no_grad():
            vit.positions.zero_()
            vit.patches.weight.fill_(1.0)
            vit.patches.bias.zero_()
        images = torch.zeros(1, 1, 8, 8)
        images[..., :2, 6:] = 1.0
        tokens = vit.patches(images).flatten(2).transpose(1, 2)
        patches, pixels = align(tokens, tapped(cnn, "stem@input", images))
        assert patches[0, 0].argmax() == pixels[0, 0].argmax() == 3

    def test_a_pair_found_in_a_compiled_network_can_be_tapped(self, clean_dynamo: None) -> None:
        model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
        x = torch.randn(4, 2)
        truth = model[1][0](model[0](x)).detach()
        compiled = torch.compile(model, backend="eager")
        (pair,) = pairs("1.0", compiled, model)
        torch.testing.assert_close(tapped(compiled, pair.student, x).detach(), truth)
