"""The character models: an embedding, a stack of recurrent layers, logits for the next character at every place."""

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from fedsim.data.dataset import Dataset
from fedsim.errors import ConfigError
from fedsim.tasks.module import ModuleConfig, Size, from_dataset
from fedsim.types import Task


class RecurrentConfig(ModuleConfig):
    """What both have to be told; the defaults are LEAF's."""

    embedding: Size = 8
    hidden: Size = 256
    layers: Annotated[int, Field(ge=1, le=16)] = 2


class _Characters(nn.Module):
    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU], vocabulary: int, config: RecurrentConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, config.embedding)
        self.rnn = cell(config.embedding, config.hidden, config.layers, batch_first=True)
        self.fc = nn.Linear(config.hidden, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.rnn(self.embedding(x))
        logits: Tensor = self.fc(states)
        return logits


def recurrent(cell: type[nn.LSTM] | type[nn.GRU], config: RecurrentConfig, dataset: Dataset, population: int) -> Task:
    """The task of predicting y (N, T) from characters x (N, T). Raises ``ConfigError`` for any other data."""
    x, y = dataset.train.x, dataset.train.y
    if x.ndim != 2 or x.shape != y.shape or x.is_floating_point():
        found = f"{dataset.name} has inputs {tuple(x.shape[1:])} of {x.dtype} and labels {tuple(y.shape[1:])}"
        raise ConfigError(f"task.model: needs characters (T,) and the next one of each as labels (T,); {found}")
    return from_dataset(lambda: _Characters(cell, dataset.classes, config), config, dataset, population)
