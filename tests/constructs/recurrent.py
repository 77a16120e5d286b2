"""Recurrent layers, cells and recurrences by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from constructs.build import Net, construct, parameter, sequences, time_first


def recurrent(layer: nn.Module, width: int = 16, call: Callable[..., Any] | None = None) -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(call(self, x) if call else self.layer(x)[0])

    return Net(forward, layer=layer, head=nn.Linear(width, 3))


@construct(
    time_first,
    {"layer.weight_ih_l0": (32, 6), "layer.weight_hh_l0": (32, 8), "head.weight": (3, 8)},
)
def lstm() -> Net:
    return recurrent(nn.LSTM(6, 16))


@construct(
    sequences, {"layer.weight_ih_l1": (32, 8), "layer.weight_hh_l1": (32, 8), "head.weight": (3, 8)}
)
def lstm_of_two_layers() -> Net:
    return recurrent(nn.LSTM(6, 16, 2, batch_first=True))


@construct(sequences, {"layer.weight_ih_l0_reverse": (32, 6), "head.weight": (3, 16)})
def lstm_in_both_directions() -> Net:
    return recurrent(nn.LSTM(6, 16, bidirectional=True, batch_first=True), 32)


@construct(sequences, {"layer.weight_hr_l0": (4, 8), "layer.weight_ih_l0": (32, 6)})
def lstm_with_a_projection() -> Net:
    net = recurrent(nn.LSTM(6, 16, proj_size=8, batch_first=True), 8)
    net.head = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    return net


@construct(
    sequences, {"layer.weight_ih_l0": (24, 6), "layer.weight_hh_l0": (24, 8), "head.weight": (3, 8)}
)
def gru() -> Net:
    return recurrent(nn.GRU(6, 16, batch_first=True))


@construct(sequences, {"layer.weight_ih_l1": (24, 16), "head.weight": (3, 16)})
def gru_of_two_layers_in_both_directions() -> Net:
    return recurrent(nn.GRU(6, 16, 2, batch_first=True, bidirectional=True), 32)


@construct(sequences, {"layer.weight_ih_l0": (8, 6), "head.weight": (3, 8)})
def rnn() -> Net:
    return recurrent(nn.RNN(6, 16, batch_first=True))


@construct(sequences, {"layer.weight_ih_l0": (32, 6), "head.weight": (3, 8)})
def last_hidden_state_of_an_lstm() -> Net:
    return recurrent(nn.LSTM(6, 16, batch_first=True), call=lambda self, x: self.layer(x)[1][0][-1])


@construct(sequences, {"layer.weight_ih_l0": (32, 6), "head.weight": (3, 8)})
def lstm_with_an_initial_state() -> Net:
    def call(self: Any, x: Tensor) -> Tensor:
        state = x.new_zeros(1, x.shape[0], self.layer.hidden_size)
        return self.layer(x, (state, state))[0]

    return recurrent(nn.LSTM(6, 16, batch_first=True), call=call)


@construct(sequences, {"cell.weight_ih": (32, 6), "cell.weight_hh": (32, 8), "head.weight": (3, 8)})
def lstm_cell() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0])

    return Net(forward, cell=nn.LSTMCell(6, 16), head=nn.Linear(16, 3))


@construct(sequences, {"cell.weight_ih": (24, 6), "cell.weight_hh": (24, 8), "head.weight": (3, 8)})
def gru_cell() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        state = torch.zeros(x.shape[0], self.width, dtype=x.dtype)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state)

    return Net(forward, cell=nn.GRUCell(6, 16), head=nn.Linear(16, 3), width=16)


@construct(sequences, {"inputs.weight": (8, 6), "hidden.weight": (8, 8), "head.weight": (3, 8)})
def recurrence_by_hand() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], self.hidden.in_features)
        for step in x.unbind(1):
            state = torch.tanh(self.inputs(step) + self.hidden(state))
        return self.head(state)

    return Net(forward, inputs=nn.Linear(6, 16), hidden=nn.Linear(16, 16), head=nn.Linear(16, 3))


@construct(sequences, {"up.weight": (16, 6), "filter.weight": (8, 1, 3), "down.weight": (3, 8)})
def gated_convolution_of_a_state_space_model() -> Net:  # Mamba's block without the scan
    def forward(self: Any, x: Tensor) -> Tensor:
        x, gate = self.up(x).chunk(2, -1)
        x = self.filter(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        return self.down(F.silu(x).cumsum(1) * torch.exp(-F.softplus(self.decay)) * F.silu(gate))

    return Net(
        forward,
        up=nn.Linear(6, 32),
        filter=nn.Conv1d(16, 16, 3, padding=2, groups=16),
        decay=parameter(16),
        down=nn.Linear(16, 3),
    )
