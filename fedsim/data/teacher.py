"""`teacher`: labels from a teacher that is a known network moved by matrices of low rank. Nothing to download.

    student   x -> W₃ relu(W₂ relu(W₁ x + b₁) + b₂) + b₃          the task `teacher` begins there
    teacher   the same with W_l + D_l for l = 1, 2, D_l of rank ``shift_rank`` and ‖D_l‖ = ``shift`` ‖W_l‖;  y = argmax

So adapters on the two hidden layers can reach the teacher exactly when their rank is large enough, and the head never
has to move. ``teacher`` numbers the shift; the student is the same for all. ``x`` float32 (N, inputs) standard normal,
``y`` int64 (N,), 3 classes.
"""

from collections import OrderedDict
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedsim.config import DatasetConfig
from fedsim.data.dataset import Dataset, Split
from fedsim.rng import Key
from fedsim.tasks.module import seeded

CLASSES = 3


class Config(DatasetConfig):
    """How many inputs and examples, and which teacher."""

    name: Literal["teacher"] = "teacher"
    teacher: int = Field(1, ge=0, description="number of the teacher")
    inputs: int = Field(8, ge=1, le=4096)
    hidden: int = Field(64, ge=1, le=4096)
    shift: float = Field(1.0, gt=0, description="‖D_l‖ / ‖W_l‖")
    shift_rank: int = Field(4, ge=1)
    train: int = Field(6000, ge=3)
    test: int = Field(2000, ge=1)


def student(inputs: int, hidden: int) -> nn.Sequential:
    """The network that everybody begins with; always the same for these widths."""
    with seeded(Key.root(0).at("teacher", "student").torch()):
        net = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(inputs, hidden),
                relu1=nn.ReLU(),
                fc2=nn.Linear(hidden, hidden),
                relu2=nn.ReLU(),
                head=nn.Linear(hidden, CLASSES),
            )
        )
        for part in net:
            if isinstance(part, nn.Linear):
                # He's scale keeps signals alive through ReLU; PyTorch's default would give a head that hardly speaks.
                nn.init.normal_(part.weight, std=(2 / part.in_features) ** 0.5)
                nn.init.zeros_(part.bias)
                if part is not net.fc1:
                    _centre(part.weight.data)
    return net


def _centre(rows: Tensor) -> Tensor:
    """Rows that sum to 0, in place: ReLU's outputs have a mean, and its share of the logits would decide the label."""
    return rows.sub_(rows.mean(1, keepdim=True))


def build(config: Config) -> Dataset:
    key = Key.root(0).at("teacher", config.teacher)
    net = student(config.inputs, config.hidden)
    with torch.no_grad():
        for name in ("fc1", "fc2"):
            W = net.get_parameter(f"{name}.weight")
            generator = key.at("shift", name).torch()
            left = torch.randn(W.shape[0], config.shift_rank, generator=generator)
            right = torch.randn(config.shift_rank, W.shape[1], generator=generator)
            D = left @ (right if name == "fc1" else _centre(right))
            W.add_(D, alpha=float(config.shift * W.norm() / D.norm()))

    def split(part: str, n: int) -> Split:
        x = torch.randn(n, config.inputs, generator=key.at(part).torch())
        with torch.no_grad():
            y: Tensor = net(x).argmax(1)
        return Split(x, y)

    return Dataset("teacher", split("train", config.train), split("test", config.test), CLASSES)
