"""A process that kills itself at a change of the file system whose number it is given."""

COUNT = """
import os, signal, sys
from pathlib import Path

target, left = Path(sys.argv[1]), int(sys.argv[2])

def count(event, arguments):
    global left
    if event in ("os.mkdir", "os.rename", "os.rmdir", "os.remove"):
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

"""
