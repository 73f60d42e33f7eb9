"""What --encoder names: one grammar for every script, read without loading torch.

parse_encoders("svmae:pretrain.pt+timm:resnet50", ("svmae", "timm"))
# [EncoderSpec("svmae", "pretrain.pt"), EncoderSpec("timm", "resnet50")]
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from common.io import UserError, optional_module

FORMS = {  # kind -> what follows its colon
    "clip": "MODEL[:FILE or open_clip's tag]",
    "timm": "MODEL[:FILE]",
    "torchvision": "MODEL[:FILE]",
    "files": "DIR",
    "svmae": "FILE",
    "stand-in": "NAME",
}
IMAGE_KINDS = ("clip", "timm", "torchvision")
VIDEO_MODELS = ("s3d", "r3d_18", "mc3_18", "r2plus1d_18", "mvit_v1_b", "mvit_v2_s", "swin3d_t", "swin3d_s", "swin3d_b")
RANDOM = "random"  # weights for tests/perf: speed does not depend on them


@dataclass(frozen=True)
class EncoderSpec:
    """One encoder. model: the network's name; of files a folder, of svmae a file, of stand-in a name. weights: a file
    or a library's name of them, None for its default."""

    kind: str
    model: str
    weights: str | None = None

    def __str__(self):
        return ":".join(filter(None, (self.kind, self.model, self.weights)))

    @property
    def is_video(self) -> bool:
        """Whether it is a network of clips, not of images."""
        return self.kind == "torchvision" and self.model in VIDEO_MODELS


def describe_forms(kinds: Collection[str]) -> str:
    """What --encoder may be, for help and errors. kinds: of FORMS, or a stand-in whole (stand-in:NAME)."""
    return ", ".join(kind if ":" in kind else f"{kind}:{FORMS[kind]}" for kind in kinds)


def parse_encoders(text: str, kinds: Collection[str]) -> list[EncoderSpec]:
    """The encoders that a text joins with `+`, of these kinds. Raises UserError for anything else."""
    parts = re.split(rf"\+(?=(?:{'|'.join(FORMS)}):)", str(text))
    return [parse_encoder(part, kinds) for part in parts]


def parse_encoder(text: str, kinds: Collection[str]) -> EncoderSpec:
    """A single encoder of these kinds. Raises UserError for anything else."""
    kind, _, rest = str(text).partition(":")
    if not rest or (kind not in kinds and text not in kinds):
        raise UserError(f"--encoder {text} is not known: expected {describe_forms(kinds)}")
    if kind not in IMAGE_KINDS:
        return EncoderSpec(kind, rest)
    model, _, weights = re.fullmatch(r"((?:hf-hub:)?[^:]*)(:?)(.*)", rest, re.S).groups()
    if not model:
        raise UserError(f"--encoder {text} names no model: expected {kind}:{FORMS[kind]}")
    return EncoderSpec(kind, model, weights or None)


def check_model(spec: EncoderSpec) -> None:
    """Refuse a model that its library does not have, and files that are missing, before any work (UserError)."""
    if spec.kind in ("svmae", "files") and not Path(spec.model).exists() and spec.model != RANDOM:
        raise UserError(f"--encoder {spec}: {spec.model} does not exist: give --encoder with its place")
    if spec.kind in IMAGE_KINDS:
        image_networks(spec).check_library(spec)


def image_networks(spec: EncoderSpec) -> ModuleType:
    """common.features.image, which holds the networks of IMAGE_KINDS. Raises UserError where a copy has left it out."""
    return optional_module("common.features.image", f"--encoder {spec}", "choose another encoder")


def check_description(trained: dict, now: dict, advice: str) -> None:
    """Refuse features that a checkpoint was not trained on (UserError). trained, now: an encoder's describe(), with or
    without the flags that named it; files may have another place."""
    parts, others = trained.get("parts", []), now.get("parts", [])
    if len(parts) == len(others):
        for part, other in zip(parts, others):
            check_description(part, other, advice)
    for key in ("weights", *sorted(set(trained) - {"encoder", "parts"})):
        if not key.endswith("flag") and trained.get(key) != now.get(key):
            was = f"features of {trained.get('encoder')} with {key} {trained.get(key)}"
            these = f"these are of {now.get('encoder')} with {now.get(key)}"
            raise UserError(f"the checkpoint was trained on {was}, {these}: {advice}")
