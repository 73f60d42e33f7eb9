"""Errors a user can cause, files written completely or not at all, and small files read without trusting them."""

import atexit
import contextlib
import csv
import errno
import functools
import glob
import hashlib
import importlib
import io
import json
import os
import socket
import sys
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

try:
    import fcntl
    import resource
except ImportError:  # not on Windows
    fcntl = resource = None

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NOT_WRITABLE = {*DISK_FULL, errno.EROFS, errno.EACCES}
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "insufficient memory")  # of numpy, OpenCV and torch
DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(10))}  # of Windows
LONGEST = 200  # bytes of a file's name without suffix
UNESCAPED = b"name as it is: "  # begins the comment of an archive's member whose name is not UTF-8
UNREADABLE = (OSError, ValueError, EOFError, SyntaxError, MemoryError, RecursionError, csv.Error, zipfile.BadZipFile)


class UserError(Exception):
    """Something the user can put right: one sentence that names the file or flag and the way out."""


def run_script(main: Callable[[], Any]) -> None:
    """Call main() and exit: an error that the user can put right is one line on stderr and code 2, Ctrl-C is 130."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # for names that the terminal cannot show
    if resource:  # every memory map keeps a file open; usual limits are 256 (macOS) and 1024
        limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(ValueError, OSError):
            allowed = max(limit, 10240) if sys.platform == "darwin" else most
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, most))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nstopped; finished work is kept, the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    except Exception as e:
        text, is_rank = user_text(e), int(os.environ.get("WORLD_SIZE", 1)) > 1
        if not text and not is_rank:
            raise
        print(f"error: {text}" if text else traceback.format_exc(), file=sys.stderr, flush=True)
        if is_rank:  # to end NCCL while other ranks wait for this one may take forever; torchrun ends them
            sys.stdout.flush()
            os._exit(2 if text else 1)
        sys.exit(2)


def user_text(e: Exception) -> str:
    """One sentence for the user, or "" where the error is a fault of the program."""
    if isinstance(e, UserError):
        return printable(e)
    if isinstance(e, OSError) and e.errno in {*NOT_WRITABLE, errno.ENOTDIR}:
        return os_error_text(e)
    advice = "lower --batch-size, or --workers where frames are being read; finished work is kept"
    is_memory = isinstance(e, MemoryError) or any(words in str(e).lower() for words in OUT_OF_MEMORY)
    return f"out of memory ({first_line(e)}): {advice}" if is_memory else ""


def os_error_text(e: OSError) -> str:
    """One sentence for a file that the operating system refused to read or write."""
    path = e.filename or "the output folder"
    if e.errno in DISK_FULL:
        return f"no space left while writing {path}: free some, or point --out and --cache to another disk"
    way_out = "change its permissions, or choose another folder with --out and --cache, or with --data-root"
    way_out = "close the program that has it open, or " + way_out if os.name == "nt" else way_out
    return f"{path} cannot be read or written ({os.strerror(e.errno)}): {way_out}"


def first_line(e: Exception) -> str:
    """The first line of an error's text, or its type where it has none; 200 characters at most."""
    text = str(e).strip() or type(e).__name__
    return text.splitlines()[0][:200]


def optional_module(name: str, needed_by: str = "", instead: str = "") -> ModuleType | None:
    """The module `name`, such as common.report, which a copy of a method may leave out: then None, or, where something
    is `needed_by` the user, a UserError that names the file and what to do `instead`."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        missing = name if f"{name}.".startswith(f"{e.name}.") else str(e.name)  # it, its folder, or what it imports
        if missing != name and not (needed_by and missing.startswith("common.")):
            raise
    if needed_by:
        path = missing.replace(".", "/") + ".py"
        raise UserError(f"{needed_by} needs {path}, which is not here: copy that file too, or {instead}")
    return None


def printable(text: Any) -> str:
    """Text as one line of UTF-8: line breaks, control characters and bytes that are not UTF-8 are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def safe_filename(name: str) -> str:
    """A file name without suffix for a video, for every file system; an ordinary name is unchanged, no two become one.

    All but letters, digits and `-._ ` is percent-encoded, as are dots and spaces at the ends, and the first letter of a
    device's name such as CON. Beyond LONGEST bytes, the end becomes a hash; all others urllib.parse.unquote() undoes.
    """
    name = str(name)
    is_device, parts = name.split(".")[0].strip().lower() in DEVICES, []
    for i, c in enumerate(name):
        is_plain = c.isalnum() or c in "-_" or (c in ". " and 0 < i < len(name) - 1)
        encoded = "".join(f"%{byte:02X}" for byte in c.encode("utf-8", "surrogatepass"))
        parts.append(encoded if not is_plain or (i == 0 and is_device) else c)
    data = "".join(parts).encode()
    if len(data) <= LONGEST:
        return data.decode()
    return data[: LONGEST - 17].decode(errors="ignore") + "~" + hashlib.sha256(data).hexdigest()[:16]


def opencv_path(path) -> str | bytes:
    """A path as OpenCV takes it: a str that is not UTF-8 ends the process with a signal, bytes do not."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return os.fsencode(path)
    return str(path)


def stamp(folder, names: Collection[str]) -> list:
    """A fingerprint of the files `names` of a folder: [count, bytes, newest time in ns, hash].

    Of files with the same size and time a part of the content is hashed too, so that exchanged names are noticed.
    Raises OSError.
    """
    stats = [os.stat(Path(folder, name)) for name in names]
    size_and_time = Counter((s.st_size, s.st_mtime_ns) for s in stats)
    digest = hashlib.sha256()
    for name, s in zip(names, stats):
        digest.update(repr((name, s.st_size, s.st_mtime_ns)).encode(errors="backslashreplace"))
        if len(names) == 1 or size_and_time[s.st_size, s.st_mtime_ns] > 1:
            with open(Path(folder, name), "rb") as f:
                f.seek(max(0, s.st_size // 2 - 2048))
                digest.update(f.read(4096))
    newest = max((s.st_mtime_ns for s in stats), default=0)
    return [len(names), sum(s.st_size for s in stats), newest, digest.hexdigest()[:16]]


def short_hash(value: Any) -> str:
    """10 hex digits that name what a JSON value holds, in any order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:10]


def writable_folder(path) -> Path:
    """Create `path` and try to write a file there, before hours of work depend on it. Raises UserError."""
    path = Path(path)
    probe = path / f".probe-{_HOST}-{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink(missing_ok=True)
    except OSError as e:
        e.filename = str(path)
        raise UserError(os_error_text(e)) from None
    return path


def _host():
    """Where a process number means one process: the machine, and the container in it."""
    with contextlib.suppress(OSError):
        return short_hash([socket.gethostname(), os.readlink("/proc/self/ns/pid")])
    return short_hash(socket.gethostname())


_HOST = _host()
_locks = {}  # path -> the open file that holds the lock


def lock_dir(folder) -> Path:
    """Lock `folder` until this process ends, however it ends. -> folder. Raises UserError if another run holds it."""
    path = Path(folder).resolve() / ".running"
    if fcntl is None or path in _locks:
        return folder
    file = open(path, "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip()
        file.close()
        raise UserError(f"{folder} is used by another run ({owner}): wait for it, or choose another --out") from None
    except OSError:
        return folder  # a network file system without locks
    file.truncate(0)
    print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
    _locks[path] = file
    atexit.register(path.unlink, missing_ok=True)
    return folder


@functools.cache  # once per folder and process
def remove_stale_parts(folder: Path) -> None:
    """Remove half-written files of processes of this machine that were killed."""
    if os.name == "nt":
        return  # os.kill would end the process that it asks for
    for part in folder.glob(f".*.{glob.escape(_HOST)}-*.part*"):
        pid = part.name.split(f".{_HOST}-")[-1].split(".")[0]
        try:
            os.kill(int(pid), 0)  # signal 0 only asks whether the process exists
        except ProcessLookupError:
            part.unlink(missing_ok=True)
        except (OSError, ValueError, OverflowError):
            pass  # somebody else's process, or no process number


@contextlib.contextmanager
def atomic_write(path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; renamed to it on success, removed on any error. An OSError names `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale_parts(path.parent)
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]  # the name itself may be as long as names can be
    tmp = path.with_name(f".{digest}.{_HOST}-{os.getpid()}.part{path.suffix}")
    try:
        yield tmp
        with open(tmp, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except OSError as e:
        e.filename = str(path)  # the name that the user knows
        raise
    finally:
        with contextlib.suppress(PermissionError):  # on Windows, where something still has it open
            tmp.unlink(missing_ok=True)


def stream_npy(path, parts: Iterable[np.ndarray], dtype=None) -> tuple[int, ...]:
    """Write arrays [n_i, …] one after another as one .npy [sum n_i, …]. dtype: of what may be empty. -> its shape"""
    header, count = np.lib.format.header_data_from_array_1_0(np.empty(0, dtype)), 0
    with atomic_write(path) as tmp, open(tmp, "wb") as f:
        for part in parts:
            if f.tell() == 0:
                header = np.lib.format.header_data_from_array_1_0(part[:0])
                np.lib.format.write_array_header_1_0(f, header)
            f.write(np.ascontiguousarray(part).data)
            count += len(part)
        f.seek(0)
        header["shape"] = (count, *header["shape"][1:])
        np.lib.format.write_array_header_1_0(f, header)  # of the same size: numpy leaves room for a longer length
    return header["shape"]


@contextlib.contextmanager
def writing_table(path) -> Iterator:
    """Yield a csv.writer of the file `path`: UTF-8 on every machine; names that are not UTF-8 are escaped."""
    with atomic_write(path) as tmp, open(tmp, "w", newline="", encoding="utf-8", errors="backslashreplace") as f:
        yield csv.writer(f)


def write_json(path, obj: Any) -> None:
    with atomic_write(path) as tmp:
        tmp.write_text(json.dumps(obj, indent=1, allow_nan=False) + "\n")


def save_arrays(path, arrays: dict[str, np.ndarray]) -> None:
    """{name: array} -> an .npz archive. Takes every name, where np.savez takes `file` for an argument.

    A name that is not UTF-8 is escaped; the comment of its member holds the name itself.
    """
    with atomic_write(path) as tmp, zipfile.ZipFile(tmp, "w") as z:
        for name, x in arrays.items():
            escaped = name.encode("utf-8", "backslashreplace").decode()
            member = zipfile.ZipInfo(f"{escaped}.npy")
            member.comment = b"" if escaped == name else UNESCAPED + name.encode("utf-8", "surrogatepass")
            with z.open(member, "w", force_zip64=True) as f:
                np.lib.format.write_array(f, np.asanyarray(x), allow_pickle=False)


@contextlib.contextmanager
def reading(what: str, path, problem: str, errors=UNREADABLE) -> Iterator[None]:
    """Turn errors of reading a file into UserError "{what} {path} is missing" or "{what} {path} {problem} (error)"."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{what} {path} is missing") from None
    except errors as e:
        raise UserError(f"{what} {path} {problem} ({first_line(e)})") from None


def read_text(path, what: str) -> str:
    """A text file in UTF-8, with or without a byte-order mark. Raises UserError, as all that follow."""
    with reading(what, path, "cannot be read as text"):
        return Path(path).read_text(encoding="utf-8-sig")


def read_table(path, what: str, names: Collection[str] = ()) -> list[tuple[int, list[str]]]:
    """Rows of a csv file, lists of stripped cells, without empty lines and comments (#). -> [(line number, row)]

    names: of videos; a line that begins with one is no comment, even if it begins with #.
    """
    text = read_text(path, what)
    used = (line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))
    first = next(used, text)
    delimiter = ";" if ";" in first and "," not in first else ","  # Excel's, where the comma is a decimal point

    def is_comment(line):
        return line.lstrip().startswith("#") and line.split(delimiter)[0].strip() not in names

    with reading(what, path, "cannot be read as csv"):
        lines = io.StringIO(text, newline="")  # a name in quotes may hold a line break
        rows = csv.reader(("\n" if is_comment(line) else line for line in lines), delimiter=delimiter)
        return [(rows.line_num, [cell.strip() for cell in row]) for row in rows if row]


def read_json(path, what: str) -> Any:
    with reading(what, path, "cannot be read as JSON"):
        return json.loads(read_text(path, what))


def load_array(path, what: str, mmap: bool = False) -> np.ndarray:
    """One .npy array, never unpickled. mmap: a read-only memory map."""
    with reading(what, path, "is not a readable .npy array; pickled objects are refused"):
        return np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)


def load_arrays(
    path, what: str, names: Iterable[str] | None = None, without: Iterable[str] = ()
) -> dict[str, np.ndarray]:
    """{name: array} of an .npz archive, never unpickled. names: only these (default: all but those in without)."""
    # zipfile and numpy raise many kinds of errors on damaged archives
    with reading(what, path, "is not a readable .npz archive; pickled objects are refused", Exception):
        with zipfile.ZipFile(path) as z:
            members, arrays = {}, {}
            for member in z.infolist():
                name = member.filename.removesuffix(".npy")
                if member.comment.startswith(UNESCAPED):
                    name = member.comment.removeprefix(UNESCAPED).decode("utf-8", "surrogatepass")
                members[name] = member
            for name in [n for n in members if n not in without] if names is None else names:
                with z.open(members[name]) as f:
                    arrays[name] = np.lib.format.read_array(f, allow_pickle=False)
            return arrays
