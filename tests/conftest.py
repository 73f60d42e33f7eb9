import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SHARED = Path(os.environ.get("VAD_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture
def shared_data():
    """The real data (UCSD Ped2, labels, a detector): beside the repository, or at $VAD_DATA."""
    if not (SHARED / "ped2").is_dir():
        pytest.skip(f"the real data is not at {SHARED} (set VAD_DATA)")
    return SHARED
