import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # one worker a core (pytest -n 2); two threads each would only wait for each other

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SHARED = Path(os.environ.get("VAD_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture
def shared_data():
    """The real data (UCSD Ped2, labels, a detector): beside the repository, or at $VAD_DATA."""
    if not (SHARED / "ped2").is_dir():
        pytest.skip(f"the real data is not at {SHARED} (set VAD_DATA)")
    return SHARED


class Listing(list):
    """What os.scandir gives, in an order of our own."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __next__(self):  # os.walk calls it
        if not self:
            raise StopIteration
        return self.pop(0)

    close = __exit__


@pytest.fixture(params=["a to z", "z to a"])
def listing(request, monkeypatch):
    """File systems list files in any order; whatever a test reads must not depend on it."""

    def ordered(listed):
        return lambda self, *args, **kwargs: iter(
            sorted(listed(self, *args, **kwargs), reverse=request.param == "z to a")
        )

    for name in ("iterdir", "glob", "rglob"):
        monkeypatch.setattr(Path, name, ordered(getattr(Path, name)))
    monkeypatch.setattr(
        os,
        "scandir",
        lambda path, listed=os.scandir: Listing(
            sorted(listed(path), key=lambda entry: entry.name, reverse=request.param == "z to a")
        ),
    )


def pytest_collection_modifyitems(items):
    """The main job takes minutes: it is begun first, so that the other worker is not left waiting for it in the end."""
    items.sort(key=lambda item: item.name != "test_the_main_job")
