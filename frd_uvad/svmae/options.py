"""How SVMAE's encoder makes features of clips. Imports no torch: flags have these defaults."""

from dataclasses import dataclass, fields


@dataclass
class EncoderOptions:
    """settings.json of a folder of features holds them. preset, size and frames are those of an encoder that is not
    pretrain.py's, seed is that of an untrained one."""

    preset: str = "vit_b"
    size: int = 224
    frames: int = 16
    seed: int = 0
    pool: str = "fusion"
    motion_ratio: float = 0.5
    alpha: float = 0.05
    depth: str = "perspective"
    crops: int = 1

    @classmethod
    def from_dict(cls, values: dict) -> "EncoderOptions":
        return cls(**{field.name: values[field.name] for field in fields(cls)})
