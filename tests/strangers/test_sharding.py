"""What users of sharded training report, each beside one process in float64."""

from __future__ import annotations

from typing import Any

import pytest
from forks import results_of

REPORTS = {
    "pytorch_153354": "two forwards through policy and reference before one backward, recomputed (DPO)",
    "weather_generator_1639": "`module.forward` is kept in a variable and called past the hooks",
    "fairscale_601": "groups of parameters with rates of their own, resumed; pytorch #140900: and their schedule",
    "transformers_48237": "weights with fewer rows than processes",
    "lightning_20138": "a head that no step uses",
    "torchtitan_2747": "experts of which some processes use none; pytorch #158719, slime #1010",
    "stable_pretraining_415": "views of several sizes, one forward after another",
    "lightning_18971": "a checkpoint after `test`; lightning #19015: `validate` after `fit`",
    "wgan": "weights are clamped by hand after every batch",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results_of("fsdp_strangers.py", tmp_path_factory.mktemp("strangers"))


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("report", REPORTS)
def test_it_is_as_in_one_process(found: list[dict[str, Any]], report: str) -> None:
    for results in found:
        result = results[report]
        numbers = list(result.values()) if isinstance(result, dict) else [result]
        assert all(isinstance(n, float) and n < 1e-11 for n in numbers), result


@pytest.mark.slow
@pytest.mark.ddp
def test_lightning_19685_a_backward_by_hand_is_told(found: list[dict[str, Any]]) -> None:
    for results in found:
        assert "call `self.manual_backward(loss)`" in results["lightning_19685"]


@pytest.mark.slow
@pytest.mark.ddp
def test_pytorch_105840_a_network_that_only_one_process_has_is_told(
    found: list[dict[str, Any]],
) -> None:
    """There it trains from random weights, with the loss a little falling."""
    for results in found:
        said = results["pytorch_105840"]
        assert "a tensor (24, 8) on rank 0 and on the meta device (24, 8) on rank 1" in said, said
