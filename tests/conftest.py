import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SHARED = Path(os.environ.get("VAD_DATA", ROOT.parent / "shared" / "data"))
MAIN_JOB = "test_the_main_job"


@pytest.fixture
def shared_data():
    """The real data (UCSD Ped2, labels, a detector): beside the repository, or at $VAD_DATA."""
    if not (SHARED / "ped2").is_dir():
        pytest.skip(f"the real data is not at {SHARED} (set VAD_DATA)")
    return SHARED


def pytest_collection_modifyitems(items):
    """The main job takes minutes: it runs beside the other tests, which use one core, and is looked at in the end."""
    items.sort(key=lambda item: item.name == MAIN_JOB)


@pytest.fixture(scope="session", autouse=True)
def main_job(request, tmp_path_factory):
    """(process, folder) of `python hf2vad/train.py --dataset demo` in an empty folder, on one thread; None where nobody asks for it."""
    if not any(item.name == MAIN_JOB for item in request.session.items):
        yield None
        return
    folder = tmp_path_factory.mktemp("main job")
    with open(folder / "said.txt", "w") as said:
        process = subprocess.Popen([sys.executable, str(ROOT / "hf2vad" / "train.py"), "--dataset", "demo"], cwd=folder, stdout=said,
                                   stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        yield process, folder
        process.kill()
        process.wait()
