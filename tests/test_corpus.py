"""Every damaged or hostile file of tests/corpus.py gives a sound result or one clear sentence: no traceback of another kind, no code
that runs, nothing written elsewhere, no hang, no memory without end."""
import resource
import shutil
import signal

import numpy as np
import pytest

from common.files import UserError
from tests.corpus import HARMLESS, KINDS, SPECIAL, SPOILED, marker

SECONDS, MEMORY = 20, 2 * 2 ** 30
CASES = [(kind, title) for kind in KINDS for title in SPOILED] + [(kind, title) for kind, title, _ in SPECIAL]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The bytes of one good file of every kind."""
    folder, out = tmp_path_factory.mktemp("sound"), {}
    for kind, (write, _) in KINDS.items():
        write(folder / kind)
        out[kind] = (folder / kind).read_bytes()
    return out


def attempt(read, path):
    """What reading gives: a value, or the UserError."""
    def too_long(*_):
        raise AssertionError(f"no end after {SECONDS} s")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        return read(path)
    except UserError as e:
        said = str(e)
        assert said and "\n" not in said and len(said) < 600, said
        return e
    finally:
        signal.alarm(0)
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


def test_there_are_many_cases():
    assert len(CASES) >= 150 and len(set(CASES)) == len(CASES)


@pytest.mark.parametrize("kind", KINDS)
def test_sound_files_are_read(kind, sound, tmp_path):
    (tmp_path / kind).write_bytes(sound[kind])
    got = attempt(KINDS[kind][1], tmp_path / kind)
    assert not isinstance(got, UserError), got


@pytest.mark.parametrize("kind,title", CASES, ids=lambda x: x.replace(" ", "-"))
def test_a_bad_file_is_one_sentence_or_no_harm(kind, title, sound, tmp_path):
    path, special = tmp_path / "in" / kind, {(k, t): w for k, t, w in SPECIAL}
    path.parent.mkdir()
    if (kind, title) in special:
        special[kind, title](path)
    else:
        path.write_bytes(SPOILED[title](sound[kind], np.random.default_rng(len(kind) * 31 + len(title))))
    before = {p for p in tmp_path.rglob("*") if path.parent not in p.parents and p != path.parent}
    got = attempt(KINDS[kind][1], path)
    assert title in SPOILED or (kind, title) in HARMLESS or isinstance(got, UserError), got
    assert not marker(path).exists()
    assert {p for p in tmp_path.rglob("*") if path.parent not in p.parents and p != path.parent} == before
    shutil.rmtree(tmp_path)
