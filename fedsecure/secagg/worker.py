"""The program of a worker process: jobs in through an inherited socket, sums out through inherited memory.

Started by :mod:`fedsecure.secagg.parallel` as ``python -m fedsecure.secagg.worker SOCKET MEMORY``, two numbers
of inherited descriptors (secagg.md §3.4). It ends when its parent closes the socket or dies, writes no core
file, and leaves an interrupt from the keyboard to its parent.
"""

from __future__ import annotations

import mmap
import os
import resource
import signal
import socket
import sys

from fedsecure.secagg import parallel, prg, recovery

ANSWERS = {parallel.MASKS: prg.answer, parallel.AGREEMENT: recovery.answer}


def main(arguments: list[str]) -> None:
    """Answer jobs until the socket closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    channel, memory = socket.socket(fileno=int(arguments[0])), int(arguments[1])
    view = memoryview(mmap.mmap(memory, parallel.SLOTS * parallel.SLOT_BYTES))
    os.close(memory)
    try:
        channel.sendall(parallel.READY)
        while message := channel.recv(parallel.MESSAGE_BYTES):
            request, start = memoryview(message), message[1] * parallel.SLOT_BYTES
            answer = ANSWERS[message[:1]](request[2:], view[start : start + parallel.SLOT_BYTES])
            channel.sendall(parallel.READY + answer)
    except (BrokenPipeError, ConnectionResetError):
        pass  # the parent has gone


if __name__ == "__main__":
    main(sys.argv[1:])
