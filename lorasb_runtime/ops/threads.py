"""How many threads torch computes with, and in which of a process' threads."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# What torch takes when nobody tells it otherwise: the machine's cores, or OMP_NUM_THREADS.
ALL_CORES = torch.get_num_threads()


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread: for small work, waiting for a busy core costs far more.

    Threads that start meanwhile keep to it as well, except where they `use_all_cores`.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def use_all_cores() -> None:
    """Have the calling thread compute with all cores; what other threads use stays as it is.

    OpenMP gives each thread that computes with several a team of its own, and once the teams have
    more threads than the machine has cores, they sleep between two operations instead of waiting
    awake, which makes a decoding step up to 1.4 times as long (libgomp's
    gomp_throttled_spin_count_var). So in a process that serves only one thread should do it at a
    time; a team ends with its thread.
    """
    others = torch.get_num_threads()
    torch.set_num_threads(ALL_CORES)
    restore = threading.Thread(target=torch.set_num_threads, args=(others,))
    restore.start()  # the number is the calling thread's own, and beside it that of new threads
    restore.join()
