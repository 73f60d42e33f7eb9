"""Errors a user can cause, files written whole or not at all, and small files read without trusting them."""

import atexit
import contextlib
import csv
import errno
import glob
import hashlib
import io
import json
import os
import socket
import sys
import urllib.parse
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None


DEVICES = {
    "con",
    "prn",
    "aux",
    "nul",
    *(f"{port}{i}" for port in ("com", "lpt") for i in range(10)),
}  # no file's name on Windows
LONGEST = 200  # bytes of a file's name without suffix
UNESCAPED = b"name as it is: "  # begins the comment of an archive's member whose name is not UTF-8


class UserError(Exception):
    """Something the user can put right: one sentence that names the file or flag and the way out."""


def run_script(main):
    """Call main() as a script does: a UserError is one line on stderr and exit code 2, Ctrl-C is 130. What a terminal cannot show, such as
    a Chinese name where it is ASCII alone, is escaped."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        sys.exit(main())
    except UserError as e:
        print(f"error: {printable(e)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; finished work is kept, the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.ENOTDIR, errno.EFBIG):
            raise
        print(f"error: {describe(e)}", file=sys.stderr)
        sys.exit(2)
    except Exception as e:
        if not out_of_memory(e):
            raise
        print(
            f"error: out of memory ({first_line(e)}): lower --batch-size, or --workers where frames are being read; what is finished is "
            "kept",
            file=sys.stderr,
        )
        sys.exit(2)


run = run_script  # goes with the last script that uses it


def out_of_memory(e):
    """Whether numpy, OpenCV or torch, on the CPU or a GPU, says so: they do it with errors of different kinds."""
    said = str(e).lower()
    return isinstance(e, MemoryError) or any(
        x in said for x in ("out of memory", "can't allocate memory", "insufficient memory")
    )


def describe(e):
    """One sentence for an operating system's refusal."""
    where = e.filename or "the output folder"
    if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"no space left while writing {where}: free some, or point --out and --cache to another disk"
    return f"cannot write {where} ({os.strerror(e.errno)}): choose a writable folder with --out and --cache"


def printable(text):
    """In one line, and UTF-8: line breaks, control characters and what is left of a name that is not UTF-8 are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def safe_filename(name):
    """A video's name as that of a file without suffix, on every file system; an ordinary name is itself, and no two become one.

    What is no letter, digit or one of `-._ ` is percent-encoded, as are dots and spaces at its ends, and one letter of a device's name
    such as CON. Of more than LONGEST bytes the end becomes a hash. original_name() gives the name back unless it was cut.
    """
    name = str(name)
    device = name.split(".")[0].strip().lower() in DEVICES
    ends = (0, len(name) - 1)
    out = ""
    for i, c in enumerate(name):
        kept = (c.isalnum() and not (device and i == 0)) or c in "-_" or (c in ". " and i not in ends)
        out += c if kept else "".join(f"%{byte:02X}" for byte in c.encode("utf-8", "surrogatepass"))
    if len(out.encode()) > LONGEST:
        out = out.encode()[: LONGEST - 17].decode(errors="ignore") + "~" + hashlib.sha256(out.encode()).hexdigest()[:16]
    return out


def original_name(stem):
    """The video's name that safe_filename() made `stem` of."""
    return urllib.parse.unquote(stem, errors="surrogatepass")


def opencv_path(path):
    """A path as OpenCV takes it: a str that is not UTF-8 ends the process with a signal, bytes do not."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return os.fsencode(path)
    return str(path)


def stamp(folder, names):
    """Changes when files `names` of a folder do: how many, how much, how new, how they are called, and a part of the content of those
    that size and time do not tell apart, so that exchanged names are noticed. Raises OSError."""
    stats = [os.stat(Path(folder, f)) for f in names]
    alike = Counter((s.st_size, s.st_mtime_ns) for s in stats)
    each = hashlib.sha256()
    for name, s in zip(names, stats):
        each.update(repr((name, s.st_size, s.st_mtime_ns)).encode(errors="backslashreplace"))
        if len(names) == 1 or alike[s.st_size, s.st_mtime_ns] > 1:
            with open(Path(folder, name), "rb") as f:
                f.seek(max(0, s.st_size // 2 - 2048))
                each.update(f.read(4096))
    return [
        len(names),
        sum(s.st_size for s in stats),
        max((s.st_mtime_ns for s in stats), default=0),
        each.hexdigest()[:16],
    ]


def writable_folder(path):
    """Create `path` and prove that a file can be written there, before hours of work depend on it."""
    path = Path(path)
    probe = path / f".probe-{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as e:
        e.filename = str(path)
        raise UserError(describe(e)) from None
    return path


_claimed = {}


def lock_dir(folder):
    """Keep `folder` for this process until it ends; a second run that would write there is refused, naming the first. -> folder"""
    path = Path(folder).resolve() / ".running"
    if fcntl is None or path in _claimed:
        return folder
    file = open(path, "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it however the process ends
    except BlockingIOError:
        file.seek(0)
        first = file.read().strip()
        file.close()
        raise UserError(
            f"{folder} belongs to another run that is still going on ({first}): wait for it to end, or choose another "
            "--out"
        ) from None
    except OSError:
        return folder  # a network file system without locks
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _claimed[path] = file
    atexit.register(path.unlink, missing_ok=True)
    return folder


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


_HOST = socket.gethostname()[:40].replace(".", "_")
_tidied = set()


def remove_stale_parts(folder):
    """Remove what killed processes of this machine left half written in a folder; once per folder and process."""
    if folder in _tidied:
        return
    _tidied.add(folder)
    for old in folder.glob(f".*.{glob.escape(_HOST)}-*.part*"):
        pid = old.name.split(f".{_HOST}-")[-1].split(".")[0]
        if pid.isdigit() and not alive(int(pid)):
            old.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary path beside `path`; renamed onto it on success, removed on any error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale_parts(path.parent)
    name = hashlib.sha256(os.fsencode(path.name)).hexdigest()[
        :12
    ]  # short, as the name itself may be as long as names can be
    tmp = path.with_name(f".{name}.{_HOST}-{os.getpid()}.part{path.suffix}")
    try:
        yield tmp
        with open(tmp, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except OSError as e:
        e.filename = str(path)  # the name the user knows
        raise
    finally:
        tmp.unlink(missing_ok=True)


def stream_npy(path, parts, dtype=None):
    """Write arrays [n_i, …] one after another as one .npy whose length is known only at the end. -> its shape.

    `dtype` is needed where there may be no part at all.
    """
    n, rest, start = 0, (), None
    with atomic_write(path) as tmp, open(tmp, "wb") as f:

        def header():
            np.lib.format.write_array_header_1_0(
                f, {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": (n, *rest)}
            )

        for part in parts:
            if start is None:
                dtype, rest = part.dtype, part.shape[1:]
                header()
                start = f.tell()
            f.write(np.ascontiguousarray(part).data)
            n += len(part)
        f.seek(0)
        header()
        if start not in (None, f.tell()):
            raise RuntimeError("numpy's header grew")  # it leaves room for a longer length
    return (n, *rest)


@contextlib.contextmanager
def writing_table(path):
    """A csv.writer of the file `path`: UTF-8 whatever the machine's own encoding is; names that are not UTF-8 are escaped."""
    with atomic_write(path) as tmp, open(tmp, "w", newline="", encoding="utf-8", errors="backslashreplace") as f:
        yield csv.writer(f)


def write_json(path, obj):
    with atomic_write(path) as tmp:
        tmp.write_text(json.dumps(obj, indent=1, allow_nan=False) + "\n")


def read_text(path, what):
    """A text file in UTF-8, with or without a byte-order mark."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{what} {path} is missing") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{what} {path} cannot be read as text ({first_line(e)})") from None


def read_table(path, what, names=()):
    """Rows of a csv file, lists of stripped cells; empty lines and comments (#) are left out. -> [(line number, row)]

    names: what may stand first in a row and is no comment, though it may begin with #.
    """
    try:
        text = read_text(path, what)
        first = text.lstrip().split("\n")[0]
        delimiter = ";" if ";" in first and "," not in first else ","  # Excel's, where the comma is a decimal point
        lines = io.StringIO(text, newline="")  # a name in quotes may hold a line break
        comment = lambda line: line.lstrip().startswith("#") and line.split(delimiter)[0].strip() not in names
        rows = csv.reader(("\n" if comment(line) else line for line in lines), delimiter=delimiter)
        return [(rows.line_num, [x.strip() for x in row]) for row in rows if row]
    except csv.Error as e:
        raise UserError(f"{what} {path} cannot be read as csv ({first_line(e)})") from None


def read_json(path, what):
    try:
        return json.loads(read_text(path, what))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{what} {path} cannot be read as JSON ({first_line(e)})") from None


def load_array(path, what, mmap=False):
    """One .npy array, never unpickled."""
    try:
        return np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{what} {path} is missing") from None
    except (OSError, ValueError, EOFError, SyntaxError, MemoryError, zipfile.BadZipFile) as e:
        raise UserError(
            f"{what} {path} is not a readable .npy array ({first_line(e)}); pickled objects are refused"
        ) from None


def save_arrays(path, arrays):
    """{name: array} -> an .npz archive, whatever the names: np.savez takes `file` for an argument of its own. A name that is not UTF-8 is
    escaped, and stands in its member's comment as it is."""
    with atomic_write(path) as tmp, zipfile.ZipFile(tmp, "w") as z:
        for name, x in arrays.items():
            shown = name.encode("utf-8", "backslashreplace").decode()
            member = zipfile.ZipInfo(f"{shown}.npy")
            member.comment = b"" if shown == name else UNESCAPED + name.encode("utf-8", "surrogatepass")
            with z.open(member, "w", force_zip64=True) as f:
                np.lib.format.write_array(f, np.asanyarray(x), allow_pickle=False)


def name_of(member):
    """The name under which save_arrays() or numpy put an array into an archive."""
    if member.comment.startswith(UNESCAPED):
        return member.comment.removeprefix(UNESCAPED).decode("utf-8", "surrogatepass")
    return member.filename.removesuffix(".npy")


def load_arrays(path, what, names=None):
    """{name: array} of an .npz archive, of all its arrays or of these, never unpickled."""
    arrays = {}
    try:
        with zipfile.ZipFile(path) as z:
            members = {name_of(member): member for member in z.infolist()}
            for name in members if names is None else names:
                with z.open(members[name]) as f:
                    arrays[name] = np.lib.format.read_array(f, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{what} {path} is missing") from None
    except Exception as e:  # zipfile and numpy raise many kinds on damaged archives
        raise UserError(
            f"{what} {path} is not a readable .npz archive ({first_line(e)}); pickled objects are refused"
        ) from None
    return arrays


def first_line(e):
    text = str(e).strip() or type(e).__name__
    return text.splitlines()[0][:200]
