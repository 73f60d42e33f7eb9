"""Runs scripts of the repository as `python script.py …` does, in processes forked from one that has imported torch and
the like already.

Half of the suite's time was `import torch`, once for every command that it tries. Nothing of the repository itself is
imported here, so that a forked process reads the scripts and common/ as a new one would.

    python tests/warm.py SOCKET  # tests/helpers.py starts one for each worker of pytest
"""

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import sys
import traceback

LIBRARIES = (
    "numpy",
    "cv2",
    "tqdm",
    "scipy.io",
    "scipy.ndimage",
    "sklearn.metrics",
    "matplotlib.pyplot",
    "torch",
    "torch.distributed",
    "torch._dynamo",
    "torchvision",
    "open_clip",
)


def serve(address):
    """Fork for every request until standard input is closed.

    -> the request, in the process that is to run its script.
    """
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        print("ready", flush=True)
        while True:
            if sys.stdin in select.select([listener, sys.stdin], [], [])[0]:
                os._exit(0)
            connection, _ = listener.accept()
            if os.fork() == 0:
                break
            connection.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request = json.loads(connection.makefile().readline())
    pid = os.fork()
    if pid:
        connection.sendall(f"{pid}\n".encode())
        status = os.waitpid(pid, 0)[1]
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        os._exit(0)
    connection.close()
    return request


def become(request):
    """Take on the arguments, folder, environment and files of a request."""
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    for number, (path, mode) in enumerate(
        ((os.devnull, os.O_RDONLY), (request["stdout"], os.O_WRONLY), (request["stderr"], os.O_WRONLY))
    ):
        file = os.open(path, mode | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.argv = request["argv"]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))


if __name__ == "__main__":
    import matplotlib

    matplotlib.use("Agg")
    for name in LIBRARIES:
        __import__(name)
    gc.freeze()
    become(serve(sys.argv[1]))
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the interpreter's own end takes a second after such imports
