"""The end of a process of wmdd: all that Python's own end does, except that no object is taken apart."""

import subprocess
import sys

PROGRAM = """
import atexit, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from wmdd.runtime import interpreter

class Witness:
    def __del__(self):
        print("taken apart")

witness = Witness()
atexit.register(print, "exit handler")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
ThreadPoolExecutor(1).submit(lambda: (time.sleep(0.1), print("pool")))
print("last word", end="")
print("", file=sys.stderr)
print()
interpreter.end(75)
"""


def test_threads_and_exit_handlers_finish_and_every_word_is_written() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 75
    assert sorted(done.stdout.split("\n")) == ["", "exit handler", "last word", "pool", "thread"]


def test_a_reader_that_is_gone_is_no_error() -> None:
    code = "import os, sys; from wmdd.runtime import interpreter; print('x'); os.close(1); interpreter.end(0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
