"""What an attacker reconstructed, in pictures and beside what the protection cost."""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsim.progress import number, size
from fedsim.report import page

ATTACK, PICTURE = "attack.json", "attack.png"
CAPTION = (
    "Originals above, reconstructions below, matched one to one. A reconstruction that is no better than the mean "
    "image shows nothing of the client's. No attack that fails is a guarantee; ε is one, where there is an ε."
)
HEADS = (
    "run", "seeds", "PSNR (dB)", "mean image", "grey", "SSIM", "mean image", "labels found", "ε", "accuracy",
    "after training", "sent up",
)  # fmt: skip


def section(run_dir: Path) -> list[str]:
    """The last attack on a run: its picture and its figures; nothing where there was none."""
    try:
        found = json.loads((run_dir / ATTACK).read_text(encoding="utf-8"))
        picture = base64.b64encode((run_dir / PICTURE).read_bytes()).decode()
    except (OSError, ValueError):
        return []
    how, f = found["attack"], found["figures"]
    title = f"Leakage: {how['method']}, {how['knowledge']}, in round {found['round']}"
    tiles = [
        ("PSNR", f"{number(f['attack_psnr'], '.1f')} dB"),
        ("PSNR of the mean image", f"{number(f['attack_psnr_mean_image'], '.1f')} dB"),
        ("SSIM", number(f["attack_ssim"], ".3f")),
        ("SSIM of the mean image", number(f["attack_ssim_mean_image"], ".3f")),
        ("labels found", number(f.get("attack_label_accuracy"), ".0%")),
    ]
    image = f'<img alt="Originals and reconstructions" src="data:image/png;base64,{picture}">'
    card = f'<figure class="card wide picture">{image}<figcaption>{CAPTION}</figcaption></figure>'
    return [page.section(title, page.tiles(tiles), page.grid([card]))]


def table(groups: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> tuple[list[str], list[list[str]]]:
    """Heads and a line for each group that was attacked; a group is a label and the summaries of its seeds."""
    lines = []
    for label, summaries in groups:
        if not summaries or any("attack_psnr" not in s for s in summaries):
            continue
        keys = ("psnr", "psnr_mean_image", "psnr_grey", "ssim", "ssim_mean_image")
        accuracy = [
            s.get("personal_accuracy_mean", s.get("client_accuracy_mean", s.get("final_accuracy"))) for s in summaries
        ]
        lines.append(
            [
                label,
                str(len(summaries)),
                *(
                    _stat([s.get(f"attack_{key}") for s in summaries], ".3f" if "ssim" in key else ".1f")
                    for key in keys
                ),
                _stat([s.get("attack_label_accuracy") for s in summaries], ".2f"),
                _stat([s.get("epsilon") for s in summaries], ".2f"),
                _stat(accuracy, ".4f"),
                _stat([s.get("local_accuracy") for s in summaries], ".4f"),
                size(sum(s.get("total_bytes_up", 0) for s in summaries) / len(summaries)),
            ]
        )
    return list(HEADS), lines


def _stat(values: Sequence[float | None], form: str) -> str:
    known = [v for v in values if v is not None]
    if len(known) < len(values):
        return "-"
    mean = sum(known) / len(known)
    if len(known) == 1:
        return format(mean, form)
    sd = (sum((v - mean) ** 2 for v in known) / (len(known) - 1)) ** 0.5
    return f"{mean:{form}} ± {sd:{form}}"
