"""A character-level LSTM in the manner of LEAF's Shakespeare model (Caldas et al. 2018, arXiv:1812.01097).

Embedding of 8, two layers of 256 units, logits over the vocabulary at every place of the sequence: 819,920 parameters
for LEAF's 80 characters (PyTorch's cell has two bias vectors).

Parameters: ``embedding.weight`` (vocabulary, embedding); of layer l ``rnn.weight_ih_l{l}``, ``rnn.weight_hh_l{l}``,
``rnn.bias_ih_l{l}``, ``rnn.bias_hh_l{l}``; ``fc.weight``, ``fc.bias``. PyTorch has no batching rule for the fused cell:
clients run one by one.
"""

from typing import Literal

from torch import nn

from fedsim.data.dataset import Dataset
from fedsim.tasks.recurrent import RecurrentConfig, recurrent
from fedsim.types import Task


class Config(RecurrentConfig):
    model: Literal["char_lstm"] = "char_lstm"


def build(config: Config, dataset: Dataset, population: int) -> Task:
    """Raises ``ConfigError`` for data other than characters x (N, T) with labels y (N, T)."""
    return recurrent(nn.LSTM, config, dataset, population)
