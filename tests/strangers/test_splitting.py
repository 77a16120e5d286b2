"""What users of tensor parallelism report, each beside one process in float64."""

from __future__ import annotations

from typing import Any

import pytest
from forks import results_of

REPORTS = {
    "adapters_opacus_789": "low-rank adapters on split layers did not converge; mcore-bridge #173: one factor had a part of its gradient",
    "two_layers_pytorch_144359": "the output of two split layers was not that of whole ones",
    "nanogpt_17": "splitting nanoGPT ended in an error of clipping; torchtune #2420",
    "norm_counts_once_nemo_rl_3788": "weights that all processes have counted once per process; TransformerEngine #715",
    "shared_norm_of_heads_megatron_7452": "the gradient of a norm that all heads share was one process's part",
    "replicas_begin_alike_nemo_automodel_3822": "weights that all processes have differed from the start",
    "heads_do_not_divide_adaptthink_1": "three heads for two processes; DeepSpeed #3634",
    "fewer_groups_than_processes_torchtitan_2577": "one group of queries for two processes; exo #1669",
    "begins_as_alone_megatron_bridge_5840": "results hung on the number of processes, by the width that weights were drawn for",
    "one_file_lightning_21357": "a file of split weights could not be loaded in a plain process",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results_of("tensor_strangers.py", tmp_path_factory.mktemp("strangers"))


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("report", REPORTS)
def test_it_is_as_in_one_process(found: list[dict[str, Any]], report: str) -> None:
    for results in found:
        assert all(isinstance(n, float) and n < 1e-11 for n in results[report].values()), results
