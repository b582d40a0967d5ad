"""Any pre-trained transformer of the Hugging Face format, from a folder on this disk.

    [task]
    model = "text"
    path = "minilm"            # fetched by `fedsim data get minilm`; or a folder with config.json and weights

With one label a text: the model's hidden states, the mean over the tokens (``pooling``), and a linear head that starts
at random, ``logits = head.weight · mean + head.bias``. With a label a token (the next one): a causal language model
with its own head. ``x`` int64 (N, T) are tokens of that model, padded with its padding token; the mask follows from
them.

``labels`` has a text for each label, in their order, and the head then starts as what the model itself makes of those
texts: a classifier before any training, and one that says nothing about the data (Radford et al. 2021,
arXiv:2103.00020, section 3.1.2). Where it is frozen, the logits of a text are ``sharpness`` times its cosines with
them, up to the length of its state:

    head.weight[c] = sharpness e_c / (|e_c| m),   head.bias = 0,   e_c the state of text c,   m the mean of |e_c|

``init`` gives the pre-trained weights, and a random head from its generator. All of it is trained, and with ``trainable
= "head"`` the rest is a constant; adapters (`ffa_lora` and its family) are put on it by the strategy. Parameters are
named as the model names them, behind ``encoder.`` or ``decoder.``, and ``head.weight``, ``head.bias``. Dropout is off,
so that clients can run in blocks and a step is a function of its batch. ``precision = "bfloat16"`` is that of the
products inside the model; parameters, gradients and the head stay float32. Needs the extra [text]; nothing is
downloaded, and no code out of a model's folder is run.
"""

import copy
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedsim.data import pretrained
from fedsim.data import text as texts
from fedsim.data.dataset import Dataset
from fedsim.errors import ConfigError, DataError
from fedsim.tasks.module import ModuleConfig, from_dataset, products
from fedsim.types import Task


class Config(ModuleConfig):
    model: Literal["text"] = "text"
    path: str = "minilm"
    pooling: Literal["mean", "first", "last"] = "mean"
    trainable: Literal["all", "head"] = "all"
    attention: Literal["eager", "sdpa"] = "eager"  # as fast on a CPU, and clients can run in blocks
    labels: list[str] = Field(default_factory=list, description="a text for each label, which the head starts as")
    sharpness: float = Field(
        20.0, gt=0, description="logits for a cosine of 1, with labels (20: as MiniLM was trained)"
    )


class Classifier(nn.Module):
    """An encoder, its states pooled over the tokens of a text, and a linear head."""

    def __init__(self, encoder: Any, classes: int, config: Config, pad: int, path: str) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, classes)
        self.pooling, self.precision, self.pad = config.pooling, config.precision, pad
        self.backbone = ("encoder", path)  # where an adapter's names begin (fedsim.tasks.adapters.files)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.states(x))
        return logits

    def states(self, x: Tensor) -> Tensor:
        """(N, T) -> (N, width)."""
        mask = x != self.pad
        dtype = self.head.weight.dtype
        with products(self.precision, x.device):
            states = self.encoder(input_ids=x, attention_mask=_additive(mask, dtype)).last_hidden_state
        return pooled(states.to(dtype), mask, self.pooling)


class Generator(nn.Module):
    """A causal language model: logits for the token after each."""

    def __init__(self, decoder: Any, config: Config, path: str) -> None:
        super().__init__()
        self.decoder, self.precision, self.backbone = decoder, config.precision, ("decoder", path)

    def forward(self, x: Tensor) -> Tensor:
        with products(self.precision, x.device):
            logits: Tensor = self.decoder(input_ids=x, use_cache=False).logits
        return logits.to(next(self.decoder.parameters()).dtype)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, T) -> (N, 1, T, T), 0 or very low. A mask that is ready is taken as it is; one that is not, is looked into by
    the model, and that cannot be done for a block of clients."""
    low = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    return low[:, None, None, :].expand(-1, 1, mask.shape[-1], -1)


def pooled(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """(N, T, width) -> (N, width): the mean over tokens that are not padding, the first, or the last of them."""
    if pooling == "first":
        return states[:, 0]
    weight = mask.to(states.dtype)
    if pooling == "last":  # the position that has as many tokens to its left as there are
        weight = weight * (weight.cumsum(1) == weight.sum(1, keepdim=True))
    return (states * weight[..., None]).sum(1) / weight.sum(1, keepdim=True).clamp_min(1)


def transformers() -> Any:
    """The package. Raises ``ConfigError`` where the extra is missing."""
    try:
        import transformers
    except ImportError:
        raise ConfigError("task.model: 'text' needs the extra [text]: pip install 'fedsim-engine[text]'") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


@lru_cache(maxsize=1)
def _read(path: Path, causal: bool, attention: str) -> Any:
    """The model in a folder, read once in a process; never used itself, only copied."""
    hf = transformers()
    try:
        config = hf.AutoConfig.from_pretrained(path, local_files_only=True)
        for name, value in vars(config).items():
            if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
                setattr(config, name, 0.0)
        kind = hf.AutoModelForCausalLM if causal else hf.AutoModel
        model = kind.from_pretrained(
            path, config=config, local_files_only=True, attn_implementation=attention, dtype=torch.float32
        )
    except (OSError, ValueError, KeyError, RuntimeError) as e:
        raise ConfigError(f"task.path: {path} cannot be opened: {str(e).splitlines()[0]}") from None
    for part in list(model.modules()):
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name, child in part.named_children():
            if isinstance(child, hf.pytorch_utils.Conv1D):
                setattr(part, name, _linear(child))
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # its output is not used, and it would be averaged for nothing
    return model.train()


def _linear(conv: Any) -> nn.Linear:
    """GPT-2's "Conv1D", x W + b, as the layer that everyone else has: x (Wᵀ)ᵀ + b."""
    linear = nn.Linear(*conv.weight.shape)
    linear.weight, linear.bias = nn.Parameter(conv.weight.detach().T.contiguous()), conv.bias
    linear.fan_in_fan_out = True  # type: ignore[assignment]  # as PEFT calls it, which will meet the original
    return linear


def _from_labels(model: Any, path: Path, config: Config, pad: int, length: int) -> Tensor:
    """``head.weight`` (classes, width) of these labels, whose texts are read as far as the data's are."""
    try:
        x = texts.tokens(config.labels, str(path), length)
    except DataError as e:
        raise ConfigError(f"task.labels: {e}") from None
    with torch.no_grad():
        states = Classifier(model, 1, config, pad, "").states(x)
    norm = states.norm(dim=1, keepdim=True)
    head: Tensor = config.sharpness * states / (norm * norm.mean())
    return head


def build(config: Config, dataset: Dataset, population: int) -> Task:
    """Raises ``ConfigError``: data that are no tokens, more tokens than the model knows, no model there, or labels that
    do not fit."""
    x, y = dataset.train.x, dataset.train.y
    if x.ndim != 2 or x.is_floating_point():
        raise ConfigError(f"task.model: 'text' needs tokens (N, T), and {dataset.name} has {x.dtype} {tuple(x.shape)}")
    try:
        path = pretrained.folder(config.path, "task.path")
    except DataError as e:
        raise ConfigError(*e.args) from None
    causal = y.ndim == 2
    model = _read(path, causal, config.attention)
    known, longest = model.config.vocab_size, getattr(model.config, "max_position_embeddings", None) or x.shape[1]
    if int(x.max()) >= known:
        raise ConfigError(f"task.path: this model knows {known} tokens, and {dataset.name} has token {int(x.max())}")
    if x.shape[1] > longest:
        raise ConfigError(f"data.length: this model reads at most {longest} tokens (got {x.shape[1]})")
    if causal and dataset.classes != known:
        raise ConfigError(f"task.path: this model has {known} tokens, and {dataset.name} has {dataset.classes} labels")
    if config.labels and (causal or len(config.labels) != dataset.classes):
        wanted = "no texts for a language model" if causal else f"{dataset.classes} texts, one for each label"
        raise ConfigError(f"task.labels: {dataset.name} needs {wanted} (got {len(config.labels)})")
    pad = pretrained.pad(path)
    head = _from_labels(model, path, config, pad, x.shape[1]) if config.labels else None

    def make() -> nn.Module:
        own = copy.deepcopy(model)
        if causal:
            return Generator(own, config, str(path))
        whole = Classifier(own, dataset.classes, config, pad, str(path))
        if config.trainable == "head":
            whole.encoder.requires_grad_(False)
        if head is not None:
            whole.head.weight.data.copy_(head)
            whole.head.bias.data.zero_()
        return whole

    outside = config.model_copy(update={"precision": "float32"})  # of the head: inside, the model sees to it
    return from_dataset(make, outside, dataset, population)
